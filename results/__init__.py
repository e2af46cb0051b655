"""What evaluate.py and the trainers leave behind: journal, figures, verdicts."""
