"""One thread: the test models are too small for more to help, and idle threads spin."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for subprocesses
os.environ.setdefault("HF_HUB_OFFLINE", "1")
