"""Exchanges in the chat template's form, made by program from code and documentation.

A docstring answers "what does this do?", a short function answers "write a function that ...", a
section of a manual answers "tell me about its title". The answers are the authors' own words; only
the questions are templates.
"""

from __future__ import annotations

import ast
import random
import re
import textwrap
from collections.abc import Iterable, Iterator

from .settings import TURN_END, TURN_START
from .small_talk import Exchange

MAX_CODE_LINES = 30
MAX_ANSWER_CHARS = 800
MIN_ANSWER_CHARS = 25

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are Baton Tiny, a small language model.",
    "You are a helpful assistant. Answer briefly.",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '" + TURN_START + "' + message['role'] + '\\n' + message['content'] + '" + TURN_END
    + "' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + TURN_START + "assistant\\n' }}{% endif %}"
)  # fmt: skip
"""Jinja source, as `tokenizer_config.json` carries it; `render` below must agree with it."""


def render(exchanges: Iterable[Exchange], system: str | None = None) -> str:
    """The training text of one conversation, with every turn closed."""
    turns = [("system", system)] if system else []
    for question, answer in exchanges:
        turns += [("user", question), ("assistant", answer)]
    return "".join(f"{TURN_START}{role}\n{text}{TURN_END}\n" for role, text in turns)


def render_prompt(question: str) -> str:
    """A one-turn chat up to where the answer begins."""
    return f"{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n"


def conversations(exchanges: list[Exchange], rng: random.Random) -> Iterator[str]:
    """The exchanges as conversations: most of one turn, some of two or three, some with a system
    prompt."""
    place = 0
    while place < len(exchanges):
        turns = rng.choice((1, 1, 1, 1, 1, 1, 2, 2, 3))
        system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.2 else None
        yield render(exchanges[place : place + turns], system)
        place += turns


def from_python(text: str, module: str, rng: random.Random) -> list[Exchange]:
    """Exchanges about the documented functions and classes of one module."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return []
    lines = text.split("\n")
    found: list[Exchange] = []
    for prefix, node in _definitions(tree):
        answer = _first_paragraphs(ast.get_docstring(node) or "")
        if answer is None or (node.name.startswith("_") and node.name != "__init__"):
            continue
        name = f"{prefix}{node.name}"
        found.append((_ask_about(name, module, node, rng), answer))
        code = _code(lines, node)
        if code is None or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if rng.random() < 0.5:
            found.append((_ask_for(node.name, answer, rng), f"```python\n{code}\n```"))
        elif rng.random() < 0.4:
            bare = _without_docstring(lines, node)
            question = rng.choice(("What does this code do?", "Explain this function."))
            found.append((f"{question}\n\n```python\n{bare}\n```", answer))
    return found


def from_manual(text: str, rng: random.Random) -> list[Exchange]:
    """Exchanges about the sections of a page, each answered by its first paragraphs."""
    headings = re.compile(
        r"^(?:#{1,4} +(?P<hash>\S.*?)#*|(?P<under>\S.*)\n(?:={4,}|-{4,}|~{4,}|\^{4,}))$",
        re.MULTILINE,
    )
    found: list[Exchange] = []
    matches = list(headings.finditer(text))
    for place, match in enumerate(matches):
        title = (match["hash"] or match["under"]).strip()
        title = re.sub(r"^[\d.]+\s+|[`*#]|\.$", "", title).strip()
        end = matches[place + 1].start() if place + 1 < len(matches) else len(text)
        answer = _first_paragraphs(text[match.end() : end].strip())
        if answer is None or not 3 <= len(title) <= 70 or not title[0].isalpha():
            continue
        found.append((_ask_for_section(title, rng), answer))
    return found


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _definitions(tree: ast.Module) -> Iterator[tuple[str, Definition]]:
    for node in tree.body:
        if isinstance(node, Definition):
            yield "", node
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield f"{node.name}.", member


def _first_paragraphs(docstring: str) -> str | None:
    """Leading prose of a docstring or section, or None if there is none of a fair length."""
    taken: list[str] = []
    size = 0
    for paragraph in textwrap.dedent(docstring).strip().split("\n\n"):
        paragraph = paragraph.strip("\n")
        first = paragraph.lstrip()
        if re.match(
            r"\.\. |>>>|Parameters\b|Args:|Returns|Raises|:param|:return|-{3,}|@|\|", first
        ):
            break
        if re.search(r"\n\s*(-{3,}|={3,})", paragraph):
            break
        if taken and (paragraph.startswith(("    ", "\t")) or size + len(paragraph) > 500):
            break
        taken.append(" ".join(line.strip() for line in paragraph.split("\n")))
        size += len(paragraph)
        if len(taken) == 3:
            break
    answer = "\n\n".join(taken).strip()
    answer = re.sub(r"::$", ".", answer)
    if not MIN_ANSWER_CHARS <= len(answer) <= MAX_ANSWER_CHARS or not answer[0].isalpha():
        return None
    return answer if answer[-1] in ".!?:`)" else answer + "."


def _code(lines: list[str], node: Definition) -> str | None:
    end = node.end_lineno or node.lineno
    if not 2 <= end - node.lineno + 1 <= MAX_CODE_LINES:
        return None
    return textwrap.dedent("\n".join(lines[node.lineno - 1 : end]))


def _without_docstring(lines: list[str], node: Definition) -> str:
    end = node.end_lineno or node.lineno
    first = node.body[0]
    kept = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno or 0 : end]
    return textwrap.dedent("\n".join(kept))


def _ask_about(name: str, module: str, node: Definition, rng: random.Random) -> str:
    full = f"{module}.{name}" if module and rng.random() < 0.6 else name
    if isinstance(node, ast.ClassDef):
        form = rng.choice(("What is `{}`?", "What is the class {} for?", "Explain {}.",
                           "What is {}?", "Tell me about {}."))  # fmt: skip
    else:
        form = rng.choice(("What does `{}` do?", "What does {} do?", "Explain `{}`.",
                           "What is {} for?", "What does the function {} do?",
                           "How do I use {}?"))  # fmt: skip
    return form.format(full)


def _ask_for(name: str, answer: str, rng: random.Random) -> str:
    sentence = re.split(r"(?<=[.!?])\s", answer)[0].rstrip(".:")
    task = sentence[0].lower() + sentence[1:]
    return rng.choice(
        (
            f"Write a Python function `{name}`: {task}.",
            f"Write a function to {task}.",
            f"Write a Python function: {task}.",
            f"Write Python code for this: {sentence}.",
            f"Implement `{name}` in Python. {sentence}.",
        )
    )


def _ask_for_section(title: str, rng: random.Random) -> str:
    if title.endswith("?"):
        return title
    if title.lower().startswith(("how ", "what ", "why ", "when ")):
        return f"{title}?"
    form = rng.choice(("Tell me about {}.", "What is {}?", "Explain {}.", "What about {}?",
                       "Describe {}.", "What do you know about {}?"))  # fmt: skip
    return form.format(title)
