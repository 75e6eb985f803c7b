"""A model's own chat template, rendered as `transformers` renders it."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from protos.errors import BatonError, ErrorCode
from router.chat_template import ChatTemplates
from tests.router.conftest import byte_level_bpe

ROOT = Path(__file__).resolve().parents[2]

TINY = json.loads((ROOT / "models/baton-tiny/tokenizer_config.json").read_text())["chat_template"]
TEMPLATES = {
    "baton-tiny": TINY,
    "bos, trimmed content, roles that must alternate": (
        "{{ bos_token }}\n"
        "{%- for message in messages %}\n"
        "    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\n"
        "        {{- raise_exception('roles must alternate') }}\n"
        "    {%- endif %}\n"
        "    {%- if message.role == 'user' %}\n"
        "        {{- '[INST] ' + message.content | trim + ' [/INST]' }}\n"
        "    {%- else %}\n"
        "        {{- ' ' + message.content | trim + eos_token }}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n"
    ),
    "tools, date, loop controls, namespace": (
        "{% set ns = namespace(seen=false) %}\n"
        "{% if tools is defined and tools %}\n"
        "Tools: {{ tools | tojson(indent=2) }}\n"
        "{% endif %}\n"
        "Year {{ strftime_now('%Y') }}\n"
        "{% for m in messages %}\n"
        "    {% if m.role == 'system' %}{% continue %}{% endif %}\n"
        "    {% set ns.seen = true %}\n"
        "{{ m.role }}: {{ m.content }}\n"
        "    {% if m.tool_calls %}{% for c in m.tool_calls %}\n"
        "<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>\n"
        "    {% endfor %}{% endif %}\n"
        "    {% generation %}x{% endgeneration %}\n"
        "{% endfor %}\n"
        "{% if ns.seen and add_generation_prompt %}assistant:{{ thinking_mode }}{% endif %}"
    ),
    "parts": (
        "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}"
        "{% else %}{% for p in m.content %}{{ p.text }}|{% endfor %}{% endif %}{% endfor %}"
    ),
}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "  Hi <b>&amp;</b> you? "}],
    "several": [
        {"role": "user", "content": "é\n\n"},
        {"role": "assistant", "content": " Good. "},
        {"role": "user", "content": "More"},
    ],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Où <fait-il> beau?",
            "parameters": {"type": "object", "properties": {"city": {"default": None}}},
        },
    }
]


def model_directory(path: Path, template: str, *, as_file: bool = False) -> Path:
    byte_level_bpe().save(str(path / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"content": "<s>", "lstrip": False, "__type": "AddedToken"},
        "eos_token": "<eos>",
    }
    if as_file:
        (path / "chat_template.jinja").write_text(template)
    else:
        config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("as_file", [False, True])
def test_the_prompt_is_what_transformers_makes(
    tmp_path: Path, name: str, chat: str, as_file: bool
) -> None:
    path = model_directory(tmp_path, TEMPLATES[name], as_file=as_file)
    theirs, ours = AutoTokenizer.from_pretrained(path), ChatTemplates.load(path)
    for tools in (None, TOOLS):
        for generation in (True, False):
            rendered = ours.choose(tools=bool(tools)).render(
                CHATS[chat],
                tools=tools,
                add_generation_prompt=generation,
                variables={"thinking_mode": "hard"},
            )
            assert rendered == theirs.apply_chat_template(
                CHATS[chat],
                tools=tools,
                add_generation_prompt=generation,
                tokenize=False,
                thinking_mode="hard",
            )


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("content", ["Once upon", " a time "])
def test_a_message_is_continued_as_transformers_continues_it(
    tmp_path: Path, name: str, content: str
) -> None:
    path = model_directory(tmp_path, TEMPLATES[name])
    chat = [{"role": "user", "content": "Tell"}, {"role": "assistant", "content": content}]
    rendered = (
        ChatTemplates.load(path)
        .choose(tools=False)
        .render(chat, add_generation_prompt=False, continue_final_message=True)
    )
    assert rendered == AutoTokenizer.from_pretrained(path).apply_chat_template(
        chat, continue_final_message=True, add_generation_prompt=False, tokenize=False
    )
    assert rendered.rstrip().endswith(content.strip())


def test_the_embedded_models_own_directory_renders_as_in_transformers() -> None:
    path = ROOT / "models/baton-tiny"
    chat = [{"role": "system", "content": "Be short."}, *CHATS["several"]]
    theirs = AutoTokenizer.from_pretrained(path).apply_chat_template(
        chat, add_generation_prompt=True, tokenize=False
    )
    assert ChatTemplates.load(path).choose(tools=False).render(chat) == theirs


def test_several_templates_are_chosen_by_what_a_request_needs(tmp_path: Path) -> None:
    listed = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "with tools"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
    templates = ChatTemplates.load(tmp_path)
    assert templates.choose(tools=False).render(CHATS["one"]) == "plain"
    assert templates.choose(tools=True).render(CHATS["one"], tools=TOOLS) == "with tools"


def test_a_template_tells_whether_it_reads_parts() -> None:
    for name, reads in (("parts", True), ("baton-tiny", False)):
        template = ChatTemplates({"default": TEMPLATES[name]}).choose(tools=False)
        assert template.reads_parts is reads


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("{{ raise_exception('no') }}", ErrorCode.INVALID_ARGUMENT),
        ("{{ messages[7].content }}", ErrorCode.INVALID_ARGUMENT),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", ErrorCode.INVALID_ARGUMENT),
        ("{{ messages.append(1) }}", ErrorCode.INVALID_ARGUMENT),
        ("{% for %}", ErrorCode.FAILED_PRECONDITION),
    ],
)
def test_what_a_template_must_not_do_is_a_typed_error(source: str, code: ErrorCode) -> None:
    with pytest.raises(BatonError) as caught:
        ChatTemplates({"default": source}).choose(tools=False).render(CHATS["one"])
    assert caught.value.code is code


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    with pytest.raises(BatonError) as caught:
        ChatTemplates.load(tmp_path).choose(tools=False)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert "no chat template" in caught.value.message


@pytest.mark.parametrize("config", ["{", "[]", '{"chat_template": [{"name": "default"}]}'])
def test_a_broken_configuration_is_named_when_a_chat_comes(tmp_path: Path, config: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(BatonError) as caught:
        ChatTemplates.load(tmp_path).choose(tools=False)
    assert caught.value.code is ErrorCode.FAILED_PRECONDITION
    assert str(tmp_path) in caught.value.message
