"""What the stages share and a test must pin; no command line in here."""

import os

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when transformers is imported
