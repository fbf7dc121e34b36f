"""An app that knows nothing of Pilotfish, as most are written in Python: high_level.py MODEL PROMPT ... Prints a line of JSON with the answer to each prompt."""

import json
import sys

from llama_cpp import Llama

model = Llama(sys.argv[1], n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
for prompt in sys.argv[2:]:
    answer = model.create_chat_completion([{"role": "user", "content": prompt}], max_tokens=32, temperature=0)
    print(json.dumps(answer["choices"][0]["message"]["content"]), flush=True)
