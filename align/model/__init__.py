"""The model path. Importing it quiets the libraries, whose bars and notes would tear ours apart, and keeps freed memory at hand."""

import ctypes
import logging
import sys
import warnings

warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from transformers.utils import logging as transformers_logging  # noqa: E402

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()

if sys.platform == "linux" and hasattr(glibc := ctypes.CDLL(None), "mallopt"):
    # glibc gives a large tensor's memory back as soon as it is freed, and the next one pays a page fault for every 4 kB:
    # 50,000 of them in a training step of 1,000 tokens, which took a tenth of its time
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    glibc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    glibc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the largest it takes
