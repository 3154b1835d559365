"""Every claim of the project, measured: see README.md here."""
