"""Where data sets lie, the demo's files, and the script that fetches the rest."""
