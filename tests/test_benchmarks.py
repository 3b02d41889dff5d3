"""The benchmarks' own machinery, with a nano model on tiny data and made-up peers: the real ones are not installed here."""
import csv
import json
import re
import sys

import pytest
import torch

from benchmarks import gpu, limit, memory, reward_fairytale, reward_hh, sft_fairytale, study, table
from benchmarks import side_by_side as bench
from nanorlhf import batching, gpt2, llama
from nanorlhf.batching import Row, pack_rows
from nanorlhf.heads import RewardModel
from nanorlhf.io import data, read, tokenizer
from nanorlhf.run import cli, precision

WHO = ("fox", "king", "queen", "bear", "crow", "wolf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """FairytaleQA, HH and a tokenizer, as small as the readers take them."""
    root = tmp_path_factory.mktemp("data")
    published = root / "FairytaleQAData" / "data-by-train-split"
    for split in ("train", "val"):
        asked = [(section, f"{word} saw it?") for section in range(1, 7) for word in ("who", "what", "why", "when", "how")]
        rows = {"section-stories": [("section", "text")] + [(i, f"The {who} saw a house.") for i, who in enumerate(WHO, 1)],
                "questions": [("cor_section", "question")] + asked}
        for kind, lines in rows.items():
            path = published / kind / split / f"tale-{'story' if kind == 'section-stories' else kind}.csv"
            path.parent.mkdir(parents=True)
            with open(path, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(lines)
    pairs = [{key: f"\n\nHuman: the {who} {i}?\n\nAssistant: {text}" for key, text in (("chosen", "gladly"), ("rejected", "no"))}
             for i in range(4) for who in WHO]
    (root / "hh-rlhf" / "helpful-base").mkdir(parents=True)
    (root / "hh-rlhf" / "helpful-base" / "train.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tokenizer.train_bpe([f"The {who} saw a house.\nQuestion: who saw it?" for who in WHO], 300).save(root / "tokenizers")
    return root


def options(benchmark, folder, *more):
    return cli.parse(benchmark.Config, ["--data", str(folder), "--size", "tiny", "--runs", "1", "--steps", "2", *more])


def side(seconds, losses=(1.0,), memory=1.0, **found):
    return bench.Side(list(seconds), list(losses), memory, {"torch": "2", "trl": "1"}, found)


ROW = bench.Row("work", "peer", 4, "pairs", 8)


@pytest.mark.parametrize("benchmark, more, units", [(reward_fairytale, [], 6), (sft_fairytale, ["--as_is"], 10)])
def test_ours_alone_runs_our_script(benchmark, more, units, folder, capsys, monkeypatch):
    monkeypatch.setattr(bench, "record", lambda result: pytest.fail("without a peer there is nothing to write"))
    result = benchmark.main(options(benchmark, folder, *more))
    assert len(result["ours_losses"]) == 2 and result["ours_seconds"] > 0 and 0 < result["share"] < 1 and result["padding"] == 0
    assert result["peer_seconds"] is result["ratio"] is None and result["per_second"] * result["ours_seconds"] == pytest.approx(units)
    assert "run 1/1  ours" in capsys.readouterr().out


def test_memory_is_the_scripts_own_and_saving_is_in_no_figure(folder, tmp_path, monkeypatch):
    # Linux's ru_maxrss would have this process's 1.5 GB in it; one step more is asked for, and nothing that follows the last is waited for.
    held, started, popen = torch.ones(400 * 2**20), [], bench.subprocess.Popen
    monkeypatch.setattr(bench.subprocess, "Popen", lambda command, **how: started.append(command) or popen(command, **how))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_bytes(data.write_groups([data.Group("a b", [data.Response(" c")])]))
    ours = bench.run_ours("train_sft.py", {"data": tmp_path / "data", "init": "gpt2-nano", "out": tmp_path / "run", "steps": 2, "groups": 1})
    assert "--steps=3" in started[0] and len(ours.seconds) == len(ours.losses) == len(ours.found["mfu"]) == 2 and not (tmp_path / "run").exists()
    assert 0.1 < ours.memory_gb < 1.3 < table.peak_gb() and held[0] == 1


def test_the_script_takes_the_groups_that_the_peer_is_given(folder, monkeypatch):
    # What the peer gets is the groups of step 0, then of step 1, as train_rm.py takes them out of the file that we write.
    seen = {}
    monkeypatch.setattr(bench, "run_ours", lambda script, flags: seen.update(ours=data.load(flags["data"]).train, flags=flags) or side([1, 1]))
    monkeypatch.setattr(bench, "run_peer", lambda python, script, job, work: seen.update(job=job) or side([1, 1]))
    monkeypatch.setattr(bench, "python_of", lambda config, environment: "python")
    reward_hh.main(options(reward_hh, folder))
    assert seen["flags"]["steps"] == 2 and len(seen["ours"]) == 2 * 8
    for step, batch in enumerate(seen["job"]["batches"]):
        groups = [seen["ours"][i] for i in batching.batch_indices(16, 8, step, seen["flags"]["seed"])]
        assert [example["prompt"] for example in batch] == [group.prompt for group in groups]
        assert all(example["chosen"] == " gladly" and example["rejected"] == " no" for example in batch)


def test_fairytale_pairs_are_all_six_best_first(folder, monkeypatch):
    seen = {}
    monkeypatch.setattr(bench, "run_ours", lambda script, flags: side([1, 1]))
    monkeypatch.setattr(bench, "run_peer", lambda python, script, job, work: seen.update(job) or side([1, 1]))
    monkeypatch.setattr(bench, "python_of", lambda config, environment: "python")
    reward_fairytale.main(options(reward_fairytale, folder))
    order = [" who saw it?", " what saw it?", " why saw it?", " when saw it?"]
    assert [(pair["chosen"], pair["rejected"]) for pair in seen["batches"][0]] == [(a, b) for i, a in enumerate(order) for b in order[i + 1:]]


def test_only_texts_with_the_same_tokens_on_both_sides_are_chosen(folder):
    tok = tokenizer.load(folder / "tokenizers")
    glued = data.Group("The fox sa", [data.Response("w it")])          # as one text "saw" is one token, apart it is two
    clean = data.Group("The fox saw", [data.Response(" it")])
    long = data.Group("The fox " * 1024, [data.Response(" it")], truncatable=True)
    assert len(tok.encode("The fox saw it")) < len(tok.encode("The fox sa")) + len(tok.encode("w it"))
    chosen, rows = bench.choose([glued, long, clean], tok, 1)
    assert chosen == [clean] and rows[0].prompt == tok.encode("The fox saw")
    with pytest.raises(read.InputError, match="has 1 suitable groups, 2 are needed"):
        bench.choose([glued, long, clean], tok, 2)


def test_other_losses_are_refused_and_nothing_is_written(folder, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(bench, "record", written.append)
    full = cli.parse(sft_fairytale.Config, ["--data", str(folder), "--runs", "1"])
    for theirs in (1.001, float("nan")):
        with pytest.raises(read.InputError, match="not the same work: the loss of step 1 is 1 here"):
            bench.measure(full, ROW, lambda: side([1, 1]), lambda theirs=theirs: side([1, 1], [theirs]))
    with pytest.raises(read.InputError, match="step 2"):                               # the same first loss, another optimizer
        bench.measure(full, ROW, lambda: side([1, 1], [1, 0.9]), lambda: side([1, 1], [1, 0.8]), later=1e-3)
    assert written == []
    bench.measure(full, ROW, lambda: side([1, 1]), lambda: side([1, 1], [1.00005]))
    assert len(written) == 1
    bench.measure(options(sft_fairytale, folder), ROW, lambda: side([1, 1]), lambda: side([1, 1]))         # a tiny model writes nothing
    assert len(written) == 1


def test_medians_ratio_and_order(folder):
    # The first step is left out. Ours: steps 1 2 9 and 3 3 4, median of all six 3, runs' medians 2 and 3; theirs: 12 12 12 and 18 18 18, median 15.
    calls = []
    ours = iter([side([99, 1, 2, 9], memory=2.0, mfu=[9, .2, .6, .6], padding=[9, 0, 0, 0]), side([99, 3, 3, 4], mfu=[9, .6, .7, .7], padding=[9, 0, 0, 0])])
    theirs = iter([side([0, 12, 12, 12], memory=4.0, padding=[9, .1, .1, .3]), side([0, 18, 18, 18], padding=[9, .1, .1, .3])])
    result = bench.measure(options(sft_fairytale, folder, "--runs", "2"), ROW,
                           lambda: calls.append("ours") or next(ours), lambda: calls.append("peer") or next(theirs))
    assert calls == ["ours", "peer", "ours", "peer"]
    assert result["ours_seconds"] == 3 and result["ours_spread"] == [2, 3] and result["ours_memory_gb"] == 2.0 and result["memory_ratio"] == 0.5
    assert result["peer_seconds"] == 15 and result["peer_spread"] == [12, 18] and result["ratio"] == 5
    assert result["share"] == pytest.approx(0.6) and result["peer_share"] == pytest.approx(0.12) and (result["padding"], result["peer_padding"]) == (0, 0.1)
    assert str(folder) not in result["command"] + result["machine"] and "--runs 2" in result["command"]
    assert {"work", "ours_seconds", "peer_seconds", "ratio", "goal", "machine", "versions", "date"} <= set(result)


def test_the_table_is_written_between_the_markers_and_nowhere_else(tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "results.json"
    readme.write_text(f"before\n{table.BEGIN}\n| old |\n{table.END}\nafter\n")
    result = {"work": "ranking", "against": "a peer", "goal": 4, "unit": "pairs", "per_second": 16, "ratio": 12.0, "machine": "a processor", "versions": "torch 2",
              "date": "2026-01-01", "ours_seconds": 0.5, "ours_spread": [0.5, 0.6], "peer_seconds": 6.0, "peer_spread": [6, 6], "share": 0.8, "padding": 0.0,
              "peer_padding": 0.25, "ours_memory_gb": 2.0, "peer_memory_gb": 4.0}
    table.record(result, results, readme)
    table.record({**result, "ratio": 13.0}, results, readme)                             # takes the place of the first
    plain = {key: result[key] for key in ("against", "goal", "ratio", "machine", "versions", "date", "ours_seconds", "peer_seconds")}
    table.record({**plain, "work": "other"}, results, readme)
    text = readme.read_text()
    assert text.startswith(f"before\n{table.BEGIN}\n") and text.endswith(f"{table.END}\nafter\n") and "old" not in text
    assert len(json.loads(results.read_text())) == 2 and text.count("| ranking |") == 1
    assert "| ranking | a peer | **13** | 4 | 0.5 (0.5 to 0.6) | 6 (6 to 6) | 16 pairs | 0.80 | 0%, 25% | 2.0, 4.0 |" in text and "a processor" in text
    assert "| other | a peer | **12** | 4 | 0.5 | 6 |  |  |  |  |" in text
    before = json.loads(results.read_text())
    readme.write_text("no markers")
    with pytest.raises(read.InputError, match="markers are gone"):
        table.record(result, results, readme)
    assert readme.read_text() == "no markers" and json.loads(results.read_text()) == before


def test_the_readme_shows_what_results_json_holds():
    rows = json.loads(table.RESULTS.read_text()) if table.RESULTS.exists() else {}
    text = table.README.read_text(encoding="utf-8")
    shown = text.partition(table.BEGIN)[2].partition(table.END)[0].strip()
    assert shown == (table.table(rows.values()) if rows else "")


@pytest.mark.parametrize("flags, message", [
    (["--peers", "nowhere"], "--peers nowhere: no now/bin/python there"), (["--data", "nowhere"], "--data nowhere: no such folder"),
    (["--data", ""], "--data (none): no such folder"), (["--steps", "1"], "--steps 1: must be at least 2"), (["--size", "huge"], "invalid choice")])
def test_mistakes_are_one_line_and_exit_code_2(flags, message, folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reward_hh", "--data", str(folder), *flags])
    with pytest.raises(SystemExit) as stopped:
        cli.run_script(reward_hh.main, reward_hh.Config)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and len(error.strip().splitlines()) == 1


def test_a_script_or_peer_that_fails_says_why(folder, tmp_path):
    with pytest.raises(read.InputError, match="train_rm.py ended with 2 after 0 steps: error: .*nowhere"):
        bench.run_ours("train_rm.py", {"data": "nowhere", "init": "gpt2-nano", "out": tmp_path / "run", "steps": 2})
    with pytest.raises(read.InputError, match="absent.py ended with 2 and no result"):
        bench.run_peer(sys.executable, "absent.py", {}, tmp_path)


def test_tuned_and_default_peers_are_two_rows(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "run_ours", lambda script, flags: side([1, 1]))
    monkeypatch.setattr(bench, "run_peer", lambda python, script, job, work: seen.append(job["peer"]) or side([1, 1]))
    monkeypatch.setattr(bench, "python_of", lambda config, environment: "python")
    rows = [benchmark.main(options(benchmark, folder, "--peer", peer))["against"] for benchmark in (reward_hh, sft_fairytale) for peer in ("tuned", "default")]
    assert seen == ["tuned", "default"] * 2 and rows == [f"trl's {name}, {peer}" for name in ("RewardTrainer", "SFTTrainer") for peer in ("tuned", "default")]


@pytest.mark.parametrize("work", ["rm", "sft", "decode"])
def test_the_share_is_the_last_line(work, folder, capsys, monkeypatch):
    monkeypatch.setattr(table, "record", lambda row: pytest.fail("a tiny model writes nothing"))
    limit.main(cli.parse(limit.Config, ["--data", str(folder) if work == "rm" else "", "--size", "tiny", "--rounds", "2", "--work", work]))
    *_, last = capsys.readouterr().out.strip().splitlines()
    assert re.fullmatch(r"share \d\.\d\d", last) and float(last.split()[1]) <= 1


def test_the_share_is_the_limits_time_over_the_steps(monkeypatch):
    # A clock that only the step and the measurements move: 2 s a step of 100 operations and 30 bytes; limits 100, 400, 100 a second and 60 bytes.
    clock, rates, flows = [0.0], iter([100, 400, 100]), iter([60, 30, 60])
    monkeypatch.setattr(limit.speed, "_now", lambda device: clock[0])
    step = lambda rows: clock.__setitem__(0, clock[0] + 2) or (100, 30, 0.5)
    found = limit.alternate(step, [limit.random_rows(1, 9)] * 2, torch.device("cpu"), lambda: (next(rates), "shape"), lambda: next(flows))
    bound = 100 / 250 + 30 / 45                  # means of before and after: (100 + 400) / 2, (60 + 30) / 2
    assert found["bound"] == bound and found["share"] == bound / 2 and found["seconds"] == 2 and found["columns"] == 250 + 4 * 14


def test_the_row_of_the_limit(folder, monkeypatch):
    written, found = [], {"seconds": 2.0, "bound": 1.5, "share": 0.75, "spread": [1.0, 3.0], "columns": 306, "operations": 1e9, "limit": 1e11, "bandwidth": 1e10,
                          "adamw": 0.1, "shape": (1, 2, 3)}
    monkeypatch.setattr(table, "record", written.append)
    monkeypatch.setattr(limit, "alternate", lambda *_: found)
    limit.main(limit.Config(data=str(folder), rounds=1))
    row, = written
    assert row["work"] == "share of the matrix-product limit in the reward-model step" and row["ratio"] == row["share"] == row["goal"] == 0.75
    table.table([row])


def test_the_gpu_benchmarks_functions_on_a_cpu():
    device, trunk = torch.device("cpu"), lambda: gpt2.GPT2(gpt2.GPT2Config(**bench.TINY, vocab_size=100, n_positions=64))
    flags = gpu.Config(groups=3, rounds=1, max_tokens=50)
    for work in ("sft", "rm"):
        found = gpu.train(work, trunk(), device, flags, "float32", compile=False, prompt=12, response=3, k=2)
        assert 0 < found["share"] < 1 and found["padding"] == 0 and found["columns"] == 3 * 18
    flex, dense, loss, gradient = gpu.flex_or_dense(trunk(), limit.random_rows(2, 100, 12, 3, 2), device, "float32", 1)
    assert flex["loss"] > 4 and loss < 1e-5 and gradient == 0 and flex["seconds"] > 0
    shape = llama.LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=8, num_attention_heads=2)
    size = lambda n: sum(p.numel() for p in llama.Llama(gpu.replace(shape, num_hidden_layers=n)).parameters()) * gpu.BYTES_EACH
    for layers in (1, 3, 8):
        assert gpu.fitting(shape, size(layers) + 1, 1.0).num_hidden_layers == layers
    assert gpu.fitting(shape, size(20), 1.0).num_hidden_layers == 8


def test_without_a_gpu_it_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit) as stopped:
        cli.run_script(gpu.main, gpu.Config)
    assert stopped.value.code == 2 and "needs a CUDA GPU" in capsys.readouterr().err


def test_the_studys_time(monkeypatch):
    written, calls = [], []
    monkeypatch.setattr(table, "record", written.append)
    monkeypatch.setattr(study.subprocess, "run", lambda command, **_: calls.append(command) or type("Done", (), {"returncode": 0}))
    clock = iter([10.0, 110.0, 10.0, 60.0])
    monkeypatch.setattr(study.time, "perf_counter", lambda: next(clock))
    row = study.main(study.Config(before=300.0))
    assert row["ours_seconds"] == 100 and row["ratio"] == 3 and row["goal"] == 2 and written == [row] and "demo" in calls[0]
    study.main(study.Config(scale="smoke"))
    assert len(written) == 1


# ---------------------------------------------------------------------------------------------------------------- memory

@pytest.mark.parametrize("dtype, activation_checkpointing", [("float32", False), ("bfloat16", False), ("bfloat16", True)])
@pytest.mark.parametrize("family, config", [(gpt2.GPT2, gpt2.GPT2Config(vocab_size=64, n_positions=512, n_embd=32, n_layer=5, n_head=2)), (llama.Llama, llama.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=80, num_hidden_layers=5, num_attention_heads=2, max_position_embeddings=512))])
def test_what_a_backward_keeps_grows_by_the_layer_and_column(family, config, dtype, activation_checkpointing):
    """Two and three layers at two lengths tell what five layers keep of three rows, where it is counted directly."""
    found = memory.kept(family, config, dtype, 3 * 512, activation_checkpointing)
    model = RewardModel(family(config))
    model.trunk.activation_checkpointing = activation_checkpointing
    with memory.counted(model) as held, precision.autocast(model, dtype):
        model(pack_rows([Row([1] * 256, [[2] * 64] * 4)] * 3))
    more = memory.a_layer(family, config, dtype, 3 * 512, False)[1] if activation_checkpointing else 0        # one block at a time is computed again
    assert found == pytest.approx(sum(storage.nbytes() for storage in held.values()) + more, rel=0.01)


def test_frozen_models_hold_their_blocks_matrices_in_bfloat16():
    # GPT-2 124M: a block has 768 x (2304 + 768 + 3072 + 3072) = 7,077,888 numbers in matrices, and 2304 + 768 + 3072 + 768 = 6,912
    # biases of the same layers; LLaMA-7B: 4 x 4096 x 4096 + 3 x 4096 x 11008 = 202,375,168
    gpt2_124m = (gpt2.GPT2, gpt2.SIZES["gpt2"])
    assert memory.frozen_bytes(*gpt2_124m, "float32") == 4 * 124_439_808
    assert memory.frozen_bytes(*gpt2_124m, "bfloat16") == 4 * 124_439_808 - 2 * 12 * (7_077_888 + 6_912)
    without_head = 6_738_415_616 - 32_000 * 4096
    assert memory.frozen_bytes(llama.Llama, llama.SIZES["llama-7b"], "bfloat16", head=False) == 4 * without_head - 2 * 32 * 202_375_168


def test_a_stage_adds_up():
    # a thousand million trained parameters have 16 bytes each; the rest is given in bytes
    line = memory.stage("train_ppo.py", 2**30, 2 * 2**30, 3 * 2**30, 2**29)
    assert list(line.values()) == ["train_ppo.py", 16.0, 2.0, 3.0, 0.5, 21.5]
    assert memory.parameters(gpt2.GPT2, gpt2.SIZES["gpt2"]) == 124_439_808             # as published: 124M
    assert memory.parameters(llama.Llama, llama.SIZES["llama-7b"]) == 6_738_415_616    # as published: 6.7B
    assert memory.parameters(llama.Llama, llama.SIZES["llama-7b"], head=False) == 6_738_415_616 - 32_000 * 4096
