"""Running a coordinator: SuperLink, gateway and ServerApp."""
