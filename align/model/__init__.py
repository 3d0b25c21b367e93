"""The model path. Importing it quiets the libraries: their progress bars and notes would tear ours apart."""

import logging
import os

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from transformers.utils import logging as transformers_logging  # noqa: E402

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()
