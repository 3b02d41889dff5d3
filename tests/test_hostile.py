"""Files that nobody should trust: thousands of damaged ones (hostile.py), and one by one the attacks that no accident makes."""
import json
import struct
import time
import tracemalloc

import hostile
import pytest
import torch
from hostile import Reader, Tally, attack, feed, put, readers, table
from test_data import GOOD, QUESTIONS, STORY, fairytale, refused, write

from nanorlhf import reward
from nanorlhf.io import data, hub, read, tokenizer
from nanorlhf.io.read import InputError
from nanorlhf.run import cli
from nanorlhf.study import judge, stages


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Every reader by name, with its sound files."""
    return {reader.name: reader for reader in readers(tmp_path_factory.mktemp("sound"))}


def folder_of(sound, name, path):
    put(path, sound[name].files)
    return path


# ---------------------------------------------------------------------------------------------------------- by the thousand

def test_sound_inputs_are_taken(sound, tmp_path):
    """Else the damaged ones would be refused for another reason."""
    for reader in sound.values():
        tally = Tally()
        if reader.name != "the page":
            feed(reader, reader.files, tmp_path / "input", tally)
            assert tally.accepted == 1 and not tally.said, (reader.name, tally.said)


def check(found, inputs, seed, folder, pages=0):
    tallies = attack(found, inputs, seed, folder, pages)
    text, bad = table(tallies)
    assert not bad, text + "\n" + "\n".join(said for tally in tallies.values() for said in tally.said)
    assert sum(tally.inputs for tally in tallies.values()) == inputs
    return tallies


def test_a_sample_of_damaged_inputs(sound, tmp_path):
    tallies = check(sound.values(), 300, 1, tmp_path / "input")
    assert sum(tally.accepted for tally in tallies.values()) > 40 and sum(tally.refused for tally in tallies.values()) > 100
    rows = check([reader for reader in sound.values() if reader.rows], 300, 2, tmp_path / "input")
    assert sum(tally.dropped for tally in rows.values()) > 50 and all(tally.accepted and tally.refused for tally in rows.values()), table(rows)[0]


@pytest.mark.slow
def test_five_thousand_damaged_inputs(sound, tmp_path):
    assert all(tally.inputs > 5 and tally.refused for tally in check(sound.values(), 5000, 0, tmp_path / "input", 10).values())


def planted(read, rows=None):
    return Reader("planted", {"x.jsonl": b"1\n2\n"}, read, rows)


@pytest.mark.parametrize("reader, column", [
    (planted(lambda f: {}["missing"]), "tracebacks"),
    (planted(lambda f: [0], lambda files, result: [(2, len(result), 0)]), "lost"),                      # two rows in, one used, none reported
    (planted(lambda f: time.sleep(60)), "hangs"),
    (planted(lambda f: exec("try:\n    while True: pass\nexcept Exception: pass")), "hangs"),           # and its `except Exception` does not save it
    (planted(lambda f: (_ for _ in ()).throw(InputError(f"{f}:\ntwo lines"))), "tracebacks"),
    (planted(lambda f: (_ for _ in ()).throw(InputError("something is wrong"))), "tracebacks"),         # with what?
    (planted(lambda f: (_ for _ in ()).throw(SystemExit(1))), "tracebacks"),
    (Reader("planted", {"x": b"1"}, lambda f: "9", None, 4, lambda result: result + 1), "tracebacks"),  # takes what cannot be used
], ids=["KeyError", "lost row", "sleeps", "loops", "two lines", "no name", "exits", "unusable"])
def test_the_harness_can_fail(reader, column, tmp_path):
    tallies = attack([reader], 2, 0, tmp_path / "input", limit=0.2)
    text, bad = table(tallies)
    assert bad and getattr(tallies["planted"], column) == 2 and tallies["planted"].said[0].startswith("input 0, "), text


def test_rows_that_add_up_are_no_loss(tmp_path):
    fine = planted(lambda f: [0], lambda files, result: [(2, len(result), 1)])
    tallies = attack([fine], 5, 0, tmp_path / "input")
    assert not table(tallies)[1] and (tallies["planted"].accepted, tallies["planted"].dropped) == (5, 5)


# ------------------------------------------------------------------------------------------------------------ sizes of files

@pytest.mark.parametrize("name", ["bomb.jsonl.gz", "bomb.jsonl"])
def test_a_file_beyond_the_bound_is_not_read_to_its_end(name, tmp_path, monkeypatch):
    """64 MB that pack into 64 kB, where 3 MB are allowed: at no time is there more than the bound, two of the pieces of 1 MB, and a copy."""
    monkeypatch.setattr(read, "MAX_FILE_BYTES", 3 * 2**20)
    path = write(tmp_path / name, b" " * 2**26)
    tracemalloc.start()
    refused(lambda: data.load(path), f"{path}: more than 3,145,728 bytes", "split the file")
    assert tracemalloc.get_traced_memory()[1] < 12 * 2**20
    tracemalloc.stop()


def test_a_line_beyond_the_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "MAX_JSON_BYTES", 1000)
    path = write(tmp_path / "a.jsonl", GOOD + json.dumps({"prompt": "p" * 1000}) + "\n")
    refused(lambda: data.load(path), f"{path}:2: not JSON (more than 1,000 bytes)")


def test_spaces_and_sections_do_not_multiply(tmp_path, monkeypatch):
    """A prompt's last spaces go to each response, a section into each passage that names it: a small file could become a terabyte."""
    responses = [{"text": "a"}] * 3
    path = write(tmp_path / "a.jsonl", [{"prompt": "p" + " " * 100, "responses": responses}, {"prompt": "p" + " " * 101, "responses": responses}])
    refused(lambda: data.load(path), f"{path}:2: the prompt ends in more than 100 spaces")
    monkeypatch.setattr(data, "MAX_FILE_BYTES", 100)
    # "Once upon\na time." has 17 letters: five of them are 85, six 102. The second question about the same passage costs nothing.
    many = lambda n: "cor_section,question\n" + f'"{",".join("1" * n)}",Who?\n' * 2
    assert len(data.load(fairytale(tmp_path / "five", STORY, many(5))).train[0].prompt) == 5 * 17 + 4 + len("\nQuestion:")
    refused(lambda: data.load(fairytale(tmp_path / "six", STORY, many(6))), "a-questions.csv:2: its passages have more than 100 letters")


def test_a_csv_field_that_is_huge(tmp_path):
    folder = fairytale(tmp_path, STORY + '9,"' + "x" * 10_000_000 + '"\n', QUESTIONS)
    refused(lambda: data.load(folder), "a-story.csv:6: not CSV (field larger than field limit (131072))")


def test_csv_columns_that_shift(tmp_path):
    """A comma that is not quoted moves what follows it into the next column, and the last field into none."""
    refused(lambda: data.load(fairytale(tmp_path, STORY, "cor_section,question\n1,Who, then?\n")), "a-questions.csv:2: 3 fields, 2 columns")
    refused(lambda: data.load(fairytale(tmp_path, STORY, "cor_section,question,question\n1,Who?,Why?\n")), "a-questions.csv:1: two columns 'question'")
    found = data.load(fairytale(tmp_path, "section,text\n1,one\n1,another\n2,two\n", 'cor_section,question\n1,Who?\n2,Why?\n"1,2",How?\n'))
    assert [r.text for r in found.train[0].responses] == [" Why?"]
    assert found.dropped == {"question about a section that the story has twice": 4}                   # two a split


# ------------------------------------------------------------------------------------------------------------ JSON

DEEP = [f'{{"prompt": "p", "responses": [], "x": {"[" * n}{"]" * n}}}' for n in (100, 900, 10**5)] + \
       [f'{{"prompt": "p", "responses": [{"[" * n}{"]" * n}]}}' for n in range(880, 1000, 5)]            # some parse, and cannot be printed


@pytest.mark.parametrize("line", DEEP, ids=range(len(DEEP)))
def test_deep_json(line, tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD + line + "\n")
    refused(lambda: data.load(path), f"{path}:2: not JSON")


def test_how_deep_json_may_be(tmp_path):
    """The object itself is one level: 99 lists inside are 100."""
    for n, fine in ((99, True), (100, False)):
        path = write(tmp_path / "a.jsonl", f'{{"prompt": "p", "x": {"[" * n}{"]" * n}}}\n')
        groups = data.read_groups(path)[0] if fine else refused(lambda path=path: data.read_groups(path), "more than 100 levels deep")
        assert not fine or data.read_groups(write(tmp_path / "b.jsonl", data.write_groups(groups)))[0] == groups


@pytest.mark.parametrize("number", ["1" * 5000, "-" + "1" * 5000, "1e999", "NaN", "-Infinity", "1" * 4000])
@pytest.mark.parametrize("name, where", [("load_policy", "n_embd"), ("load_reward_model", "n_layer")])
def test_numbers_that_are_none(name, where, number, sound, tmp_path):
    folder = folder_of(sound, name, tmp_path / "model")
    text = (folder / "config.json").read_text()
    values = json.loads(text)
    (folder / "config.json").write_text(text.replace(f'"{where}": {values[where]}', f'"{where}": {number}'))
    refused(lambda: sound[name].read(folder), f"{folder}/config.json: ", "not JSON" if len(number) > 4300 else where)


@pytest.mark.parametrize("moments", ['{"mean": ["0.5", 1.0]}', '{"mean": [1%s, 1.0]}' % ("0" * 400), '{"mean": [NaN, 1]}', '{"mean": [0, 1e999]}',
                                     '{"mean": [0, -1]}', "[[0, 1]]"])
def test_moments_that_are_no_numbers(moments, sound, tmp_path):
    folder = folder_of(sound, "load_reward_model", tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    values["nanorlhf_reward"]["moments"] = "MOMENTS"
    (folder / "config.json").write_text(json.dumps(values).replace('"MOMENTS"', moments))
    refused(lambda: hub.load_reward_model(folder), f"{folder}/config.json: nanorlhf_reward")


# -------------------------------------------------------------------------------------------------------- weights

@pytest.mark.parametrize("change", [{"n_layer": 999_999_999}, {"n_embd": 999_999_996}, {"vocab_size": 999_999_999}, {"n_inner": 999_999_999},
                                    {"n_positions": 999_999_999}])
@pytest.mark.parametrize("name", ["load_policy", "load_reward_model"])
def test_a_config_that_claims_billions_gets_no_memory(name, change, sound, tmp_path, monkeypatch):
    """The header of the weights beside it is compared first: no parameter is ever given memory, and no billion of layers is built."""
    folder = folder_of(sound, name, tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | change))
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda *_, **__: pytest.fail("memory was asked for"))
    began = time.process_time()
    refused(lambda: sound[name].read(folder), str(folder))
    assert time.process_time() - began < 5


def test_labels_that_claim_a_million_outputs(sound, tmp_path, monkeypatch):
    folder = folder_of(sound, "load_reward_model", tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"id2label": {str(i): "" for i in range(10**5)}}))
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda *_, **__: pytest.fail("memory was asked for"))
    refused(lambda: hub.load_reward_model(folder), "model.safetensors: tensor 'score.weight' has shape (3, 8), config.json says (100000, 8)")


def test_weights_that_are_larger_than_memory(sound, tmp_path, monkeypatch):
    """A file with holes can state any size and be that long, so config.json and header may agree."""
    def none_left(*_, **__):
        raise RuntimeError("you tried to allocate 9 bytes. Buy new RAM!")
    monkeypatch.setattr(torch.nn.Module, "to_empty", none_left)
    folder = folder_of(sound, "load_policy", tmp_path / "model")
    # 270 tokens and 32 positions of width 8; a block: 2 x 16 for the norms, 8 x 24 + 24, 8 x 8 + 8, 8 x 32 + 32, 32 x 8 + 8; a norm of 16
    n = (270 + 32) * 8 + 2 * (32 + 216 + 72 + 288 + 264) + 16
    refused(lambda: hub.load_policy(folder), f"{folder}: {n:,} parameters", "do not fit into memory")


@pytest.mark.parametrize("length", [2**40, 2**43, 2**63, 2**64 - 1, 100_000_001])
def test_a_header_of_terabytes(length, sound, tmp_path):
    folder = folder_of(sound, "load_policy", tmp_path / "model")
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + raw[8:])
    refused(lambda: hub.load_policy(folder), f"{folder}/model.safetensors: not a readable safetensors file")


NAME = "model-00001-of-00002.safetensors"


def with_index(sound, folder, name):
    """A sharded folder whose index names another file for the tensors of the first."""
    folder_of(sound, "load_trunk, shards", folder)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {key: name if old == NAME else old for key, old in json.loads(path.read_text())["weight_map"].items()}}))
    return folder


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/x.safetensors", "{}/x.safetensors", "a/../" + NAME, "./" + NAME, "\0.safetensors",
                                  "\ud800.safetensors", "..", "x" * 9999 + ".safetensors"])
def test_an_index_that_names_a_file_elsewhere(name, sound, tmp_path):
    folder = with_index(sound, tmp_path / "model", name.format(tmp_path))
    refused(lambda: hub.load_trunk(folder), f"{folder}/model.safetensors.index.json: ", "is not the name of a safetensors file in this folder")


@pytest.mark.parametrize("link", ["relative", "absolute", "loop", "folder"])
def test_an_index_that_names_a_link_to_elsewhere(link, sound, tmp_path):
    folder = folder_of(sound, "load_trunk, shards", tmp_path / "model")
    (folder / NAME).rename(tmp_path / "secret.safetensors")
    (tmp_path / "there").mkdir()
    to = {"relative": "../secret.safetensors", "absolute": tmp_path / "secret.safetensors", "loop": NAME, "folder": tmp_path / "there"}[link]
    (folder / NAME).symlink_to(to)
    refused(lambda: hub.load_trunk(folder), str(folder), NAME if link == "loop" else "outside this folder")


def test_the_hubs_cache_is_links_and_loads(sound, tmp_path):
    """models--NAME/snapshots/REVISION/file -> ../../blobs/HASH: what huggingface_hub leaves on a disk."""
    folder, blobs = tmp_path / "models--x/snapshots/0123", tmp_path / "models--x/blobs"
    folder.parent.mkdir(parents=True)
    blobs.mkdir()
    folder_of(sound, "load_trunk, shards", folder)
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(i))
        path.symlink_to(f"../../blobs/{i}")
    (tmp_path / "short").symlink_to(folder)
    one, two = (hub.load_trunk(path)[0].parameters() for path in (folder, tmp_path / "short"))
    assert all(torch.equal(p, q) for p, q in zip(one, two, strict=True))


# -------------------------------------------------------------------------------------------------------- tokenizers

def changed(sound, folder, change):
    """tokenizer.json after `change`, a function of its table."""
    folder_of(sound, "tokenizer.json", folder)
    table = json.loads((folder / "tokenizer.json").read_text())
    change(table)
    (folder / "tokenizer.json").write_text(json.dumps(table))
    return folder


def split_by(pattern):
    return lambda table: table["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": pattern})


@pytest.mark.parametrize("change, words", [
    (lambda t: t["model"]["vocab"].update(zzz=10**18), "the id 1,000,000,000,000,000,000 is far beyond"),            # an embedding of so many rows
    (lambda t: t["added_tokens"].append({"id": 10**7, "content": "x", "special": True}), "the id 10,000,000 is far beyond"),
    (lambda t: t["added_tokens"][1].update(id=5), "an id of its own"),                                               # <|begin|> would be a letter
    (lambda t: t["model"]["vocab"].update({"a" * 10_000: 300}), "too long to be merged"),                            # 10^8 comparisons
    (lambda t: t["pre_tokenizer"].update(pretokenizers=t["pre_tokenizer"]["pretokenizers"] * 9), "27 steps"),
    (split_by("(a+)+b"), "the split pattern '(a+)+b'"), (split_by("x*x*x*x*x*!"), "timed out"), (split_by(r"\p{L}*\p{L}*\p{L}*\p{L}*q"), "timed out"),
    (split_by("a{1000000000}" * 50), "the split pattern"),
    (split_by("(" * 600 + "a" + ")" * 600), "split pattern"), (split_by("(" * 450 + "a" + ")" * 450), "layout"),
    (lambda t: t["post_processor"]["special_tokens"]["<|begin|>"].update(ids=[267.0]), "begins with an unknown id, 267.0"),    # equal to 267, and no index
])
def test_a_tokenizer_that_asks_for_too_much(change, words, sound, tmp_path):
    folder = changed(sound, tmp_path / "tok", change)
    refused(lambda: hub.load_tokenizer(folder), str(folder), words)


def test_a_byte_that_is_a_special_token(sound, tmp_path):
    """It is never made from text, so the byte vanishes like one that has no token; tiktoken, asked for it, would end the process."""
    def change(table):
        table["added_tokens"].append({"id": table["model"]["vocab"]["q"], "content": "q", "special": True})
    tok = tokenizer.load(changed(sound, tmp_path / "tok", change))
    assert tok.encode("q") == [] and tok.decode(tok.encode("aqb")) == "ab"


def test_a_settings_file_with_half_a_letter(sound, tmp_path):
    """UTF-8 cannot spell half of a surrogate pair: saving the folder again would end in a UnicodeEncodeError."""
    folder = changed(sound, tmp_path / "tok", lambda table: None)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "\\ud800"}')
    refused(lambda: hub.load_tokenizer(folder), str(folder))


def test_a_tokenizer_file_beyond_the_bound(sound, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "MAX_JSON_BYTES", 1000)
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json, merges.txt"):
        folder = folder_of(sound, name, tmp_path / name)
        refused(lambda folder=folder: hub.load_tokenizer(folder), str(folder), "more than 1,000 bytes")


# -------------------------------------------------------------------------------------------------------- judges, the page

def test_an_endpoint_that_never_stops_talking(sound, tmp_path):
    """A fast server could fill the memory within the time limit. What is no answer is asked TRIES times, then one line."""
    put(tmp_path / "x", {"reply.json": b'{"choices": [{"message": {"content": "' + b"A" * 2**22 + b'"}}]}'})
    refused(lambda: hostile.ask(tmp_path / "x"), "no answer in 6 tries", "more than 1,048,576 bytes")


def test_a_deep_line_in_the_cache(tmp_path):
    raw = b'{"key": "k", "answered_by": "m", "ranking": %s}\n'
    path = write(tmp_path / "c.jsonl", raw % b"[]" + raw % (b"[" * 900 + b"]" * 900) + raw % (b"[" * 10**5) + b'{"key": "h')
    found = judge.OpenAI("http://localhost:1/v1", "m", path)
    assert (found.cache, found.damaged) == ({"k": []}, 3)                      # asked again, and said in the last line


@pytest.mark.parametrize("flags", ["[]", "5", '{"kappa": "1"}', '{"kappa": NaN}', '{"kappa": true}', '{"labels": "best"}', '{"labels": []}'])
def test_flags_that_no_training_had(flags, sound, tmp_path):
    folder = folder_of(sound, "evaluate --reward", tmp_path / "run")
    (folder / "config.json").write_text(f'{{"flags": {flags}}}')
    refused(lambda: hostile.measured(folder), f"{folder}/config.json: flags ", "are not those of train_rm.py")


def test_what_a_reference_drops_is_said(tmp_path, capsys):
    folder = fairytale(tmp_path, STORY, "cor_section,question\n1,Who?\n9,Where?\n")
    judge.load_judge(judge.Config("reference", "x", reference=str(folder)))
    assert capsys.readouterr().out == f"{folder}: dropped {{'question about a section that the story lacks': 2}}\n"          # one a split


def test_no_text_of_a_model_becomes_markup(tmp_path):
    pytest.importorskip("matplotlib")
    from test_report import Tags, made_up, rows_of, write_study

    from nanorlhf.study import report
    evil = ["</script><script>alert(1)</script>", '"><img src=x onerror="alert(1)">', "a & b &lt; 'c' \"d\"", "=cmd()"]
    found = made_up(0)
    found["texts"] = [{"prompt": text, "responses": {text: {"text": text, "gold": 1.0}}} for text in evil]          # a policy's name, too
    found["row"]["words"][:4] = evil
    found["policies"][evil[0]] = found["policies"]["sft"]
    found["wins"] |= {evil[1]: found["wins"]["ranking : sft"], "$\\frac{$ : x": found["wins"]["ranking : sft"]}    # to matplotlib a formula, and a broken one
    out = write_study(tmp_path / "study", [found])
    state = json.loads((out / "study.json").read_text())
    (out / "study.json").write_text(json.dumps(state | {"scale": evil[0], "workers": evil[1]}))
    report.write(out, 1)
    html = (out / "page/index.html").read_text(encoding="utf-8")
    tags = Tags(html)
    assert not {tag for tag, _ in tags.tags} & {"script", "img"} and not any(name.startswith("on") for _, attributes in tags.tags for name in attributes)
    assert "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in html and "a &amp; b &amp;lt; &#x27;c&#x27; &quot;d&quot;" in html
    assert all(text in "".join(tags.text) for text in evil)                     # shown, every letter
    assert [row["question"] for row in rows_of(out, "texts_table")] == evil     # csv quotes what it must


@pytest.mark.parametrize("change, words", [
    (lambda r: r["policies"]["sft"].update(gold="<b>1</b>"), "'gold' '<b>1</b>' is no number"),
    (lambda r: r["policies"]["sft"].update(gold=float("nan")), "'gold' nan"),
    (lambda r: r["policies"]["sft"].update(gold=1e308), "'gold' 1e+308"), (lambda r: r["row"].update(positions=["<b>"]), "'positions' '<b>'"),
    (lambda r: r.update(seed="<b>"), "'seed' '<b>'"), (lambda r: r.pop("ways"), "KeyError('ways')"),
    (lambda r: r.update(wins={"ranking : classification": 5}), "is not as the study wrote it")])
def test_results_that_no_page_can_show(change, words, tmp_path):
    pytest.importorskip("matplotlib")
    from test_report import made_up, write_study

    from nanorlhf.study import report
    found = made_up(0)
    change(found)
    out = write_study(tmp_path / "study", [found])
    refused(lambda: report.write(out, 1), str(out), words)
    assert not (out / "page").exists()


def test_answers_keep_their_line_breaks(tmp_path):
    """U+2028, U+0085 and a form feed end a line for str.splitlines, not in JSONL: a policy may well write them."""
    text = " a\u2028b\x85c\x0cd\x1ce"
    path = write(tmp_path / "a.jsonl", data.write_groups([data.Group("p", [data.Response(text)])] * 2))
    assert [group.responses[0].text for group in stages.answers_in(path)] == [text] * 2


# ---------------------------------------------------------------------------------------------------------- words

def test_a_statistic_has_one_spelling():
    """q03 would not be found among the moments, and its reward not be normalised, without a word."""
    assert reward.parse_statistic("q03", 10) == reward.parse_statistic("q3", 10) == "q3"
    for name in ("q" + "1" * 5000, "q" + "0" * 5000 + "9" * 3, "cvar:" + "9" * 5000):
        with pytest.raises(InputError, match="expected mean, q0"):
            reward.parse_statistic(name, 10)


def test_a_word_of_a_million_letters_is_cut():
    refused(lambda: cli.parse(judge.Config, ["--judge", "a", "--data", "b", "--" + "x" * 10**6]), "unrecognized arguments")
    refused(lambda: cli.parse(judge.Config, ["--judge", "a", "--data", "b", "--seed", "9" * 5000]), "invalid int value")


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "/dev/null/x"])
def test_names_that_no_file_can_have(name):
    refused(lambda: data.load(name), "no such file or folder")
    with pytest.raises(InputError):
        data.read_groups(name)
