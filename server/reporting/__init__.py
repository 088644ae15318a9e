"""Events, run folders and what a person sees."""
