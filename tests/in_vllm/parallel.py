"""Run by a test: the new tokens of a few requests, on so many processes, as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import engines

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"


def main():
    folder, processes = Path(sys.argv[1]), int(sys.argv[2])
    llm = engines.start(folder, tensor_parallel_size=processes)
    asked = [{"prompt_token_ids": engines.prompt(700 + number, number)} for number in range(2)]
    found = {}
    for policy in sys.argv[3:]:
        outputs = llm.generate(asked, engines.params(policy, 0.3, 20), use_tqdm=False)
        found[policy] = [list(each.outputs[0].token_ids) for each in outputs]
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
