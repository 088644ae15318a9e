"""The report page: one HTML file without scripts from elsewhere, made from the events of one run or of several."""
