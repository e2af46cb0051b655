"""What the stages share and a test must pin; no command line in here."""
