"""Tell what weights a file or folder holds, or convert them: `lmim export` as a script.

    convert_checkpoint.py SOURCE                             what it is, its sizes and what it lacks
    convert_checkpoint.py SOURCE DESTINATION [--format F]    its weights in another format

SOURCE is anything that lmim reads: a run folder or checkpoint, a .pth (the authors', MAE's, timm's), a .safetensors,
a folder of DeepSpeed, torch.distributed.checkpoint, transformers or timm. Nothing in it is executed.
"""

from __future__ import annotations

import sys

from lmim.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
