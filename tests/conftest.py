"""Settings of all tests: no network, one thread."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch  # noqa: E402


torch.set_num_threads(1)
