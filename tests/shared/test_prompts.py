"""Prompt files: every form gives the same prompts, and every slip is told with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.errors import SettingsError
from shared.planning import make_plan
from shared.prompts import Prompt, read_prompt_file, require_multiple
from shared.schemas import PromptOptions

FULL = PromptOptions(
    negative_prompt="ugly, flat", width=64, height=72, seed=1, cfg_scale=7.5, steps=20, sampler="euler"
)
LINES = """# mine

a red ball --n ugly, flat --w 64 --h 72 --d 1 --l 7.5 --s 20 --ss euler
  # indented
藍色的球
"""
TOML = """
[prompt]
width = 64
scale = 7.5
sample_steps = 20

[[prompt.subset]]
prompt = "a red ball"
negative_prompt = "ugly,  flat"
height = 72
seed = 1
sample_sampler = "k_euler"

[[prompt.subset]]
prompt = "藍色的球"
scale = 4
"""


def prompts_of(tmp_path: Path, content: str, name: str = "prompts.txt") -> tuple[Prompt, ...]:
    file = tmp_path / name
    file.write_text(content, encoding="utf-8")
    return read_prompt_file(file)


@pytest.mark.parametrize(
    ("name", "content", "second"),
    [
        pytest.param("prompts.txt", "\ufeff" + LINES, {}, id="lines"),
        pytest.param("prompts.toml", TOML, {"width": 64, "steps": 20, "cfg_scale": 4.0}, id="TOML"),
        pytest.param(
            "prompts.json",
            json.dumps(
                [
                    {"prompt": "a red ball", "negative_prompt": "ugly, flat", "width": 64, "height": 72, "seed": 1}
                    | {"scale": 7.5, "sample_steps": 20, "sample_sampler": "Euler"},
                    "藍色的球 --s 4",
                ]
            ),
            {"steps": 4},
            id="JSON",
        ),
    ],
)
def test_every_form_says_the_same(tmp_path, name, content, second):
    assert prompts_of(tmp_path, content, name) == (
        Prompt("a red ball", FULL),
        Prompt("藍色的球", PromptOptions(**second)),
    )


@pytest.mark.parametrize(
    ("line", "text", "options"),
    [
        pytest.param("a ball", "a ball", {}, id="words alone"),
        pytest.param("a ball,  soft -- light", "a ball, soft -- light", {}, id="a dash between blanks"),
        pytest.param("a t--shirt", "a t--shirt", {}, id="dashes inside a word"),
        pytest.param("5 dice --s 3 --W 64", "5 dice", {"steps": 3, "width": 64}, id="any order, capital letters"),
        pytest.param("h 20 high --d 9223372036854775807", "h 20 high", {"seed": 2**63 - 1}, id="the largest seed"),
        pytest.param("a --n x --l 0", "a", {"negative_prompt": "x", "cfg_scale": 0.0}, id="no guidance"),
        pytest.param("a --n (low quality), x-ray --d 2", "a", {"negative_prompt": "(low quality), x-ray", "seed": 2},
                     id="the negative prompt ends at the next option"),
        pytest.param("a --ss DPM++ 2M Karras", "a", {"sampler": "dpmpp_2m_karras"}, id="a sampler by its title"),
        pytest.param("a\t--h  72", "a", {"height": 72}, id="blanks of any kind"),
    ],
)  # fmt: skip
def test_options_of_a_line_start_at_two_dashes_and_a_letter(tmp_path, line, text, options):
    assert prompts_of(tmp_path, line) == (Prompt(text, PromptOptions(**options)),)


BAD_LINES = [
    ("a --x 3", "line 1: '--x' will not do; there is no such option; choose among --n, --w, --h, --d, --l, --s, --ss"),
    ("a --cn pose.png", "line 1: '--cn' will not do"),
    ("a --w", "line 1 --w: '' will not do; write a whole number"),
    ("a --w 64px", "line 1 --w: '64px' will not do; write a whole number"),
    ("a --w 64.0", "write a whole number"),
    ("a --w ６４", "write a whole number"),
    ("a --w 0", "line 1 --w: '0' will not do; write a value from 8 to 4096"),
    ("a --h 100000", "line 1 --h: '100000' will not do; write a value from 8 to 4096"),
    ("a --h 100", "line 1 --h: '100' will not do; write a multiple of 8, such as 96 or 104"),
    ("a --d -1", "line 1 --d: '-1' will not do; write a value from 0 to 9223372036854775807"),
    ("a --d 9223372036854775808", "write a value from 0 to"),
    ("a --l nan", "line 1 --l: 'nan' will not do; write a number"),
    ("a --l 1e999", "write a number"),
    ("a --l -1", "write a value from 0 to 100"),
    ("a --s 1001", "write a value from 1 to 1000"),
    ("a --s 2 --s 2", "line 1 --s: '2' will not do; the option is there twice"),
    ("a --ss", "line 1 --ss: '' will not do; write a text behind it"),
    ("a --ss euler_a", "line 1 --ss: 'euler_a' will not do; that sampler is not there; choose among"),
    ("a --n  --w 64", "line 1 --n: '' will not do; write a text behind it"),
    ("--w 64", "line 1: '' will not do; there are no words before the options"),
    ("a\n\n# b\nb --s x", "line 4 --s: 'x' will not do"),
    ("# nothing\n", "it holds no prompt; write one a line"),
]
BAD_TOML = [
    ("[prompt]\nsubset = 3", "one [[prompt.subset]] table for each prompt"),
    ("", "one [[prompt.subset]] table for each prompt"),
    ("[prompt]\nsubset = []", "it holds no prompt"),
    ("prompt = 'a'", "one [[prompt.subset]] table for each prompt"),
    ("a = 1\nb", "mend the TOML"),
    ("[prompt]\nwidth = 65\n[[prompt.subset]]\nprompt = 'a'", "toml line 2: width: 65 will not do; write a multiple"),
    (
        "[[prompt.subset]]\nprompt = 'a'\n[[prompt.subset]]\nprompt = 'b'\nseed = -1",
        "toml line 5: seed: -1 will not do",
    ),
    ("[[prompt.subset]]\nprompt = 'a'\nseed = true", "toml line 3: seed: True will not do; write a whole number"),
    ("[[prompt.subset]]\nprompt = 'a'\nscale = 'x'", "toml line 3: scale: 'x' will not do; write a number"),
    ("[[prompt.subset]]\nprompt = 'a'\nscale = [1]", "toml line 3: scale: [1] will not do; write a number"),
    ("[[prompt.subset]]\nprompt = 'a'\nguidance_scale = 1", "toml line 3: 'guidance_scale' will not do"),
    ("[prompt]\nsubset = [{prompt = 'a', seed = -1}]", "toml prompt 1: seed: -1 will not do"),
    ("[[prompt.subset]]\nwidth = 64", "prompt 1: '' will not do; there are no words"),
    ("[[prompt.subset]]\nprompt = ['a']", "line 2: prompt: ['a'] will not do; write the prompt as text"),
    ("[[prompt.subset]]\nprompt = 'a'\nsample_sampler = 3", "line 3: sample_sampler: 3 will not do; write a text"),
    (f"[[prompt.subset]]\nprompt = 'a'\nseed = {'9' * 5000}", "mend the TOML (Exceeds the limit (4300 digits)"),
    (f"[[prompt.subset]]\nprompt = 'a'\nseed = 0x{'f' * 5000}", "mend the TOML (Exceeds the limit (4300 digits)"),
    (f"[[prompt.subset]]\nprompt = {'[' * 100_000}", "mend the TOML ("),
    ("[other]\n[prompt]\nsubset = [{prompt = 'a'}]", "toml line 1: 'other' will not do; only [prompt] is read"),
]
BAD_JSON = [
    ("[1", "mend the JSON"),
    ("{}", "write a JSON list"),
    ("[[]]", "json prompt 1: [] will not do; write a string or an object"),
    ("[]", "it holds no prompt"),
    ('["a", "b --s 0"]', "json prompt 2 --s: '0' will not do"),
    ('[{"prompt": "a", "width": 1.5}]', "json prompt 1: width: 1.5 will not do; write a whole number"),
    ("[" * 100_000, "mend the JSON (it is nested too deeply)"),
    (f"[{'9' * 5000}]", "mend the JSON (Exceeds the limit (4300 digits)"),
    (r'["a", "b \ud800"]', r"json prompt 2: '\ud800' will not do; that is half a character"),
    (r'[{"prompt": "a", "negative_prompt": "\udfff"}]', r"json prompt 1: '\udfff' will not do"),
    (r'[{"\ud800": "a"}]', r"json prompt 1: '\ud800' will not do"),
    ('[{"prompt": null}]', "json prompt 1: prompt: None will not do"),
]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param(name, content, message, id=f"{name}: {content}"[:60])
        for name, cases in (("p.txt", BAD_LINES), ("p.toml", BAD_TOML), ("p.json", BAD_JSON))
        for content, message in cases
    ],
)
def test_a_slip_is_one_error_with_its_place_its_value_and_the_remedy(tmp_path, name, content, message):
    with pytest.raises(SettingsError) as caught:
        prompts_of(tmp_path, content, name)
    assert message in str(caught.value)
    assert name in str(caught.value)


def test_both_halves_of_a_character_are_one(tmp_path):
    (prompt,) = prompts_of(tmp_path, r'["a \ud83d\ude00"]', "p.json")
    assert prompt.text == "a \N{GRINNING FACE}"


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("p.txt", "missing.txt"):
        with pytest.raises(SettingsError, match="name a readable UTF-8 text file"):
            read_prompt_file(tmp_path / name)


def test_a_size_that_the_base_models_latents_cannot_have_is_told_with_its_line(tmp_path):
    prompts = prompts_of(tmp_path, "a\nb --w 72\n")
    require_multiple(prompts, 8)
    with pytest.raises(SettingsError, match=r"line 2: width: 72 will not do; write a multiple of 16, such as 64 or 80"):
        require_multiple(prompts, 16)


def test_only_what_differs_from_the_plan_is_part_of_it(tmp_path, tiny_config):
    def planned(content: str):
        return make_plan(base_model=tiny_config, prompts=prompts_of(tmp_path, content), device="cpu")

    plain = planned("a\nb\n")
    assert plain == make_plan(base_model=tiny_config, prompts=["a", "b"], device="cpu")
    assert planned("a --w 64 --h 64 --s 20 --l 7.5 --d 42 --ss dpm++_2m_karras\nb") == plain
    other = planned("a\nb --w 72 --h 64\n")
    assert other.overrides == (PromptOptions(), PromptOptions(width=72))
    assert other.digest() != plain.digest()
    with pytest.raises(SettingsError, match="line 1 --w: '12'"):
        planned("a --w 12")


@pytest.fixture
def tiny_config(tmp_path) -> Path:
    """What a plan reads of a base model: latents of 16 x 16, each for 4 x 4 px."""
    for name, document in {
        "model_index.json": {"unet": ["diffusers", "X"], "vae": ["diffusers", "X"]},
        "unet/config.json": {"sample_size": 16},
        "vae/config.json": {"block_out_channels": [1, 2, 3]},
    }.items():
        file = tmp_path / "base" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(document))
    (tmp_path / "base/unet/model.safetensors").write_bytes(b"weights")
    return tmp_path / "base"
