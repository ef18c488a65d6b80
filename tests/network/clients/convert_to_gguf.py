"""Script that converts a checkpoint with llama.cpp's own converter, whose list of tokenizers lacks the examples'.

python convert_to_gguf.py LLAMA_CPP CHECKPOINT OUTPUT.gguf
"""

import runpy
import sys
from pathlib import Path


def main():
    """Convert in float32; the examples split text as GPT-2 does."""
    source, checkpoint, output = sys.argv[1:]
    sys.path[:0] = [source, str(Path(source) / "gguf-py")]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    sys.argv = ["convert_hf_to_gguf.py", checkpoint, "--outfile", output, "--outtype", "f32"]
    runpy.run_path(str(Path(source) / sys.argv[0]), run_name="__main__")


if __name__ == "__main__":
    main()
