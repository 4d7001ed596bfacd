"""Row formats of instruction data: prompt–completion, alpaca, messages → prompt and answer segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from leantune.errors import UserError, shown
from leantune.recipes import DataRecipe

# (format, columns that say so), in the order they are tried.
SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("messages", ("messages",)),
    ("alpaca", ("instruction", "output")),
    ("prompt-completion", ("prompt", "completion")),
    ("text", ("text",)),
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Segment:
    """A piece of a row: `learned` pieces carry labels, the others are masked."""

    text: str
    ids: tuple[int, ...]
    learned: bool


def find_format(recipe: DataRecipe, columns: Sequence[str], where: str) -> str:
    """The row format that the recipe names, or that the columns show.

    Raises:
        UserError: The columns show none, or lack what the named format needs.
    """
    if recipe.prompt or recipe.completion:
        if not (recipe.prompt and recipe.completion):
            raise UserError("data.prompt and data.completion belong together: name both columns")
        return "prompt-completion"
    if recipe.format == "auto":
        if recipe.text is not None:
            return "text"
        for form, needed in SIGNS:
            if all(name in columns for name in needed):
                return form
        wanted = "; ".join(f"{form}: {', '.join(needed)}" for form, needed in SIGNS)
        raise UserError(f"{where}: no known format in its columns ({', '.join(columns)}); known are {wanted}")
    if recipe.format == "text" and recipe.text is not None:
        return "text"
    missing = [name for name in dict(SIGNS)[recipe.format] if name not in columns]
    if missing:
        raise UserError(
            f"data.format = {recipe.format!r}: {where} has no column {', '.join(missing)} "
            f"(columns: {', '.join(columns)})"
        )
    return recipe.format


def segments(
    recipe: DataRecipe, form: str, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None, where: str
) -> list[Segment]:
    """One row → prompt and answer pieces in order. Without a tokenizer the ids stay empty.

    Raises:
        UserError: A field is not text, or chat rows meet a tokenizer without chat template.
    """
    if form == "messages":
        return _chat(row["messages"], tokenizer, where)
    if form == "alpaca":
        fields = {
            name: _text(row.get(name) or "", name, where) for name in ("instruction", "input", "output")
        }
        template = ALPACA_WITH_INPUT if fields["input"].strip() else ALPACA
        prompt, completion = template.format(**fields), fields["output"]
    else:
        names = recipe.prompt or "prompt", recipe.completion or "completion"
        prompt, completion = (_text(row[name], name, where) for name in names)
    if tokenizer is None:
        return [Segment(prompt, (), False), Segment(completion, (), True)]
    end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    before = tuple(prompt_ids(tokenizer, prompt))
    answer = tuple(tokenizer(completion, add_special_tokens=False)["input_ids"])
    return [Segment(prompt, before, False), Segment(completion, answer + end, True)]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, special: bool = True) -> list[int]:
    """A prompt's ids, open at the end: some tokenizers close every text, and the answer comes before that."""
    ids = list(tokenizer(prompt, add_special_tokens=special)["input_ids"])
    closed = special and ids and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id)
    return ids[:-1] if closed else ids


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: column {column!r} is {shown(value)}, not text")
    return value


def _chat(messages: Any, tokenizer: PreTrainedTokenizerBase | None, where: str) -> list[Segment]:
    """Render with the tokenizer's chat template; what the assistant says is learned.

    The template is rendered up to each assistant turn and again with it: the difference is what the
    assistant must learn to write, end-of-turn marks included, whatever the template looks like.
    """
    turns = _check_messages(messages, where)
    if tokenizer is None:
        before = "\n".join(str(turn["content"]) for turn in turns[:-1])
        return [Segment(before, (), False), Segment(str(turns[-1]["content"]), (), True)]
    if tokenizer.chat_template is None:
        raise UserError(
            f"{where}: chat rows need a tokenizer with a chat template, and this model's has none"
        )
    parts: list[Segment] = []
    done = ""
    for position, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        earlier = turns[:position]
        upto = str(tokenizer.apply_chat_template(earlier, tokenize=False, add_generation_prompt=True))
        whole = str(tokenizer.apply_chat_template(turns[: position + 1], tokenize=False))
        if not (upto.startswith(done) and whole.startswith(upto)):
            raise UserError(
                f"{where}: the model's chat template rewrites earlier turns, so answers cannot be told apart"
            )
        for text, learned in ((upto[len(done) :], False), (whole[len(upto) :], True)):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            parts.append(Segment(text, tuple(ids), learned))
        done = whole
    return parts


def _check_messages(messages: Any, where: str) -> list[dict[str, str]]:
    good = isinstance(messages, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in messages
    )
    if not good:
        raise UserError(f"{where}: `messages` must be a list of turns with `role` and `content`")
    if not any(turn["role"] == "assistant" for turn in messages):
        raise UserError(f"{where}: `messages` has no turn of the assistant to learn from")
    return messages
