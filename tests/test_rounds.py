"""The loop on stored vectors: end to end, killed anywhere, longer, with labels that are awaited, and without a leak."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load
from scipy.stats import spearmanr

from cli.main import WAITING, run
from engine import oracles, rounds
from engine.chosen import Chosen, hold_out
from engine.evaluate import linear_accuracy, read_test
from engine.folders import read_manifest
from engine.info import describe
from engine.ingest import import_features
from engine.oracles import Waiting
from engine.places import Place
from engine.probe import train_head
from engine.rounds import heads
from engine.schema import InputError, build_options
from engine.select import select
from engine.selections import open_selection
from engine.store import FeatureStore
from engine.verbs import ImportOptions, RoundsOptions, SelectOptions
from engine.verify import verify


def store_of(folder, name, x, y):
    np.savez(folder / f"{name}.npz", features=x, labels=y, ids=np.array([f"{name}-{row:04d}" for row in range(len(x))]))
    import_features(ImportOptions(file=str(folder / f"{name}.npz"), out=str(folder / name)))
    return str(folder / name)


@pytest.fixture(scope="module")
def stores(tmp_path_factory, digits):
    """A pool of 600 digits and 400 to test on."""
    folder = tmp_path_factory.mktemp("stores")
    x, y = digits
    return store_of(folder, "pool", x[:600], y[:600]), store_of(folder, "test", x[600:1000], y[600:1000])


def told(stores, out, **given):
    values = {
        "subject": stores[0],
        "test": stores[1],
        "out": str(out),
        "oracle": "column",
        "strategy": "entropy",
        "start": 30,
        "add": 40,
        "rounds": 3,
        "linear_epochs": 300,
        "embed_workers": 0,
    }
    return build_options(RoundsOptions, {key: value for key, value in (values | given).items() if value is not None}, "rounds")


def picks_of(out, number):
    return open_selection(f"{out}/round-{number:02d}/selection").picks.tolist()


def all_picks(out, count=3):
    return [picks_of(out, number) for number in range(count)]


def flat(picks):
    return [row for some in picks for row in some]


@pytest.fixture(scope="module")
def finished(stores, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    return out, rounds.rounds(told(stores, out))


@pytest.mark.parametrize("strategy", ["random", "margin", "coreset", "badge"])
def test_every_kind_of_strategy_runs_and_accuracy_rises(stores, tmp_path, strategy):
    manifest = rounds.rounds(told(stores, tmp_path / "out", strategy=strategy))
    values = [entry["metrics"][0]["value"] for entry in manifest["table"]]
    assert values[-1] > values[0] + 3
    picks = flat(all_picks(tmp_path / "out"))
    assert len(set(picks)) == len(picks) == 110


def test_what_is_published(finished, stores):
    out, manifest = finished
    assert (manifest["kind"], manifest["strategy"], manifest["criterion"]) == ("rounds", "entropy", "accuracy")
    assert (manifest["seed"], manifest["start"], manifest["add"], manifest["rounds"]) == (0, 30, 40, 3)
    assert manifest["subject_digest"] == FeatureStore(stores[0]).digest
    assert manifest["test_digest"] == FeatureStore(stores[1]).digest
    table = pq.read_table(out / "rounds.parquet")
    assert {name: str(table.schema.field(name).type) for name in table.column_names} == {
        "round": "int64",
        "labeled": "int64",
        "trained": "int64",
        "metric": "string",
        "value": "double",
        "seconds": "double",
    }
    assert table["round"].to_pylist() == [0, 1, 2]
    assert table["labeled"].to_pylist() == table["trained"].to_pylist() == [30, 70, 110]
    assert set(table["metric"].to_pylist()) == {"accuracy"}
    assert all(seconds > 0 for seconds in table["seconds"].to_pylist())
    assert verify(str(out))["bad"] == []


def test_a_round_is_what_the_verbs_give_one_by_one(finished, stores, tmp_path):
    """The head's accuracy is `evaluate`'s linear probe; the picks are those of `select` on its probabilities."""
    out, manifest = finished
    store, chosen = FeatureStore(stores[0]), sorted(flat(all_picks(out, 2)))
    test = read_test(stores[1], store)
    train = heads.Labelled(heads.normalize(torch.from_numpy(store.vectors(np.array(chosen)))), store.labels[chosen])
    assert manifest["table"][1]["metrics"][0]["value"] == linear_accuracy(train, test, 300, 0)
    kept = tmp_path / "kept"
    rounds.rounds(told(stores, kept, keep_models="all"))
    given = {"budget": "40", "strategy": "entropy", "labeled": str(kept / "round-01" / "labeled.json"), "workers": 0}
    select(SelectOptions(features=str(kept / "round-01" / "features" / "probs"), out=str(tmp_path / "picks"), **given))
    assert open_selection(str(tmp_path / "picks")).picks.tolist() == picks_of(out, 2)


def test_each_round_may_add_another_number(finished, stores, tmp_path):
    manifest = rounds.rounds(told(stores, tmp_path / "out", add="20,5%,20", rounds=4))
    assert manifest["add"] == [20, 30, 20]
    assert [found["labeled"] for found in manifest["table"]] == [30, 50, 80, 100]
    assert [len(picks) for picks in all_picks(tmp_path / "out", 4)] == [30, 20, 30, 20]
    assert picks_of(tmp_path / "out", 1) == picks_of(finished[0], 1)[:20]
    with pytest.raises(InputError, match="add"):
        rounds.rounds(told(stores, tmp_path / "out", add="20", rounds=4))


def test_the_same_command_again_does_nothing(finished, stores):
    out, manifest = finished
    assert rounds.rounds(told(stores, out)) == manifest
    assert rounds.rounds(told(stores, out, rounds=2, keep_models="all")) == manifest
    with pytest.raises(InputError, match=r"options.add 40 -> 41"):
        rounds.rounds(told(stores, out, add=41))


STAGES = ["base", "read", "_predict", "select", "answer", "keep_labels", "train", "train_head", "publish", "discard"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("after", [False, True])
def test_killed_in_any_stage_it_goes_on_to_the_same_picks(finished, stores, tmp_path, monkeypatch, stage, after):
    """The stage's function raises in round 1, before it does anything or after all it does."""
    owner = next(one for one in (heads.Heads, heads, rounds) if hasattr(one, stage))
    real, calls = getattr(owner, stage), []

    def killed(*args, **kwargs):
        calls.append(stage)
        if len(calls) != (1 if stage in ("base", "read", "_predict") else 2):
            return real(*args, **kwargs)
        if after:
            real(*args, **kwargs)
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(owner, stage, killed)
        with pytest.raises(KeyboardInterrupt):
            rounds.rounds(told(stores, out))
    manifest = rounds.rounds(told(stores, out))
    assert all_picks(out) == all_picks(finished[0])
    assert [found["metrics"] for found in manifest["table"]] == [found["metrics"] for found in finished[1]["table"]]
    assert verify(str(out))["bad"] == []
    assert not (out / "round-00" / "features").exists()


def test_more_rounds_make_a_finished_run_longer(finished, stores, tmp_path):
    out = tmp_path / "out"
    rounds.rounds(told(stores, out, rounds=2))
    assert describe(str(out))["rounds"] == 2
    manifest = rounds.rounds(told(stores, out))
    assert all_picks(out) == all_picks(finished[0])
    assert manifest["rounds"] == 3
    assert [found["metrics"] for found in manifest["table"]] == [found["metrics"] for found in finished[1]["table"]]


@pytest.mark.parametrize(("keep", "there"), [("all", [0, 1]), ("last", [1]), ("none", [])])
def test_what_is_kept_is_what_the_manifests_say(stores, tmp_path, keep, there):
    out = tmp_path / "out"
    rounds.rounds(told(stores, out, rounds=2, keep_models=keep))
    assert [number for number in (0, 1) if (out / f"round-{number:02d}" / "head" / "head.safetensors").exists()] == there
    assert (out / "round-00" / "features").exists() == (keep == "all")
    assert verify(str(out))["bad"] == []
    gone = [number for number in (0, 1) if "let_go" in describe(str(out / f"round-{number:02d}" / "head"))]
    assert gone == [number for number in (0, 1) if number not in there]
    told_gone = [path for number in (0, 1) for path in describe(str(out / f"round-{number:02d}"))["let_go"]]
    assert sorted(path for path in told_gone if path.endswith("safetensors")) == [
        f"round-{number:02d}/head/head.safetensors" for number in gone
    ]
    if keep == "none":
        with pytest.raises(InputError, match="needs the model of round 1, which --keep-models none let go"):
            rounds.rounds(told(stores, out))
        assert describe(str(out))["state"] == "published"
    else:
        rounds.rounds(told(stores, out, keep_models=keep))


def test_without_a_model_to_read_a_run_goes_on_all_the_same(stores, tmp_path):
    rounds.rounds(told(stores, tmp_path / "out", strategy="random", rounds=2, keep_models="none"))
    assert rounds.rounds(told(stores, tmp_path / "out", strategy="random", keep_models="none"))["rounds"] == 3


# --- influence


@pytest.mark.parametrize("strategy", ["influence", "gradient_similarity"])
def test_a_tenth_is_held_out_for_what_needs_a_reference_set(stores, tmp_path, strategy):
    """The scores are those of the closed form: - h . (p - e_y) x^T / n, y the likeliest class."""
    out = tmp_path / "out"
    manifest = rounds.rounds(told(stores, out, strategy=strategy, keep_models="all"))
    assert [(found["labeled"], found["trained"]) for found in manifest["table"]] == [(30, 27), (70, 63), (110, 99)]
    scores = FeatureStore(str(out / "round-01" / "features" / strategy))
    store, values = FeatureStore(stores[0]), scores.vectors()[:, 0]
    assert (scores.column, scores.num_labeled) == ("influence", 0)
    state = load((out / "round-01" / "head" / "head.safetensors").read_bytes())
    x = heads.normalize(torch.from_numpy(store.vectors()))
    probs = torch.nn.functional.linear(x, state["weight"], state["bias"]).softmax(dim=1)
    images = np.array(json.loads((out / "round-01" / "labeled.json").read_text()))
    _, held = hold_out(Chosen(images, ""), 7, 0)
    wrong = probs[held.rows] - torch.eye(10)[store.labels[held.rows]]
    v = wrong.T @ x[held.rows]
    expected = -((probs - torch.eye(10)[probs.argmax(dim=1)]) * (x @ v.T)).sum(dim=1).numpy() / 600
    if strategy == "gradient_similarity":
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-6)
    else:
        assert spearmanr(values, expected).statistic > 0.9
        assert not np.allclose(values, expected, rtol=1e-2)
    unlabelled = np.setdiff1d(np.arange(600), images)
    assert picks_of(out, 2) == unlabelled[np.argsort(values[unlabelled], kind="stable")][:40].tolist()


def test_a_reference_set_of_its_own(stores, tmp_path, digits):
    x, y = digits
    reference = store_of(tmp_path, "reference", x[1000:1100], y[1000:1100])
    given = {"strategy": "influence", "encoder_option": ("restarts=1", "steps=20", "images=4")}
    manifest = rounds.rounds(told(stores, tmp_path / "out", reference=reference, **given))
    assert [(found["labeled"], found["trained"]) for found in manifest["table"]] == [(30, 30), (70, 70), (110, 110)]
    with pytest.raises(InputError, match=r"inputs.reference"):
        rounds.rounds(told(stores, tmp_path / "out", **given))


# --- oracles


def labels_csv(stores, rows, file, lie=None):
    store = FeatureStore(stores[0])
    labels = {row: int(store.labels[row]) for row in rows} | (lie or {})
    names = store.ids(np.array(list(labels)))
    file.write_text("id,label\n" + "".join(f"{n},{label}\n" for n, label in zip(names, labels.values(), strict=True)))
    return file


def test_labels_in_a_folder_are_awaited(finished, stores, tmp_path, capsys):
    asked = tmp_path / "asked"
    asked.mkdir()
    out, options = tmp_path / "out", told(stores, tmp_path / "out", oracle=str(asked))
    line = ["rounds", stores[0], "--strategy", "entropy", "--oracle", str(asked), "--test", stores[1], "--out", str(out)]
    line += ["--start", "30", "--add", "40", "--rounds", "3", "--linear-epochs", "300", "--embed-workers", "0"]
    for number in range(3):
        found = rounds.rounds(options)
        assert isinstance(found, Waiting)
        assert (found.number, found.num_images) == (number, 30 if number == 0 else 40)
        folder, picks = asked / f"round-{number:02d}", picks_of(out, number)
        assert run([*line, "--json"]) == WAITING == 3
        facts = json.loads(capsys.readouterr().out)
        assert (facts["state"], facts["round"], facts["folder"]) == ("waiting", number, str(folder))
        lines = (folder / "to_label.csv").read_text().splitlines()
        assert lines[:2] == ["id,uri,row,rank", f"pool-{picks[0]:04d},,{picks[0]},0"]
        assert (folder / "ids.txt").read_text().split() == [f"pool-{row:04d}" for row in picks]
        labels_csv(stores, picks[:-2], folder / "labels.csv")
        with pytest.raises(
            InputError, match=f"no label of 2 of the {len(picks)} images picked in round {number}: .*same command"
        ):
            rounds.rounds(options)
        other = [row for row in range(600) if row not in flat(all_picks(out, number + 1))][:5]
        labels_csv(stores, [*picks, *other], folder / "labels.csv", lie=dict.fromkeys(other, 9))
    manifest = rounds.rounds(options)
    assert all_picks(out) == all_picks(finished[0])
    assert [found["metrics"] for found in manifest["table"]] == [found["metrics"] for found in finished[1]["table"]]
    assert read_manifest(Place(str(out / "round-02")))["num_labels_unused"] == 5


def test_a_folder_serves_one_run(stores, tmp_path):
    (tmp_path / "asked").mkdir()
    rounds.rounds(told(stores, tmp_path / "one", oracle=str(tmp_path / "asked")))
    with pytest.raises(InputError, match="asks for other images"):
        rounds.rounds(told(stores, tmp_path / "two", oracle=str(tmp_path / "asked"), seed=1))


def test_two_files_of_labels_are_one_too_many(stores, tmp_path):
    (tmp_path / "asked").mkdir()
    rounds.rounds(told(stores, tmp_path / "one", oracle=str(tmp_path / "asked")))
    for name in ("labels.csv", "labels.jsonl"):
        (tmp_path / "asked" / "round-00" / name).write_text("")
    with pytest.raises(InputError, match=r"labels.csv and labels.jsonl: leave the one"):
        rounds.rounds(told(stores, tmp_path / "one", oracle=str(tmp_path / "asked")))


def test_a_file_is_asked_for_the_picks_and_what_lacks_is_named(finished, stores, tmp_path):
    whole = labels_csv(stores, range(600), tmp_path / "whole.csv")
    rounds.rounds(told(stores, tmp_path / "out", oracle=str(whole)))
    assert all_picks(tmp_path / "out") == all_picks(finished[0])
    lacking = picks_of(finished[0], 1)[3]
    labels_csv(stores, [row for row in range(600) if row != lacking], whole)
    with pytest.raises(InputError, match=f"no label of 1 of the 40 images picked in round 1: 'pool-{lacking:04d}'"):
        rounds.rounds(told(stores, tmp_path / "other", oracle=str(whole)))


def test_no_label_of_an_unpicked_image_is_used(finished, stores, tmp_path, monkeypatch, digits):
    """A copy of the pool whose labels are wrong for everything that is never picked gives the same picks; and nobody is
    asked for another row than the picks.
    """
    x, y = digits
    picked = sorted(flat(all_picks(finished[0])))
    poisoned = (y[:600] + 1) % 10
    poisoned[picked] = y[picked]
    copy = store_of(tmp_path, "pool", x[:600], poisoned)
    asked, own = [], oracles.StoreSubject.own
    monkeypatch.setattr(oracles.StoreSubject, "own", lambda self, rows: asked.append(rows.tolist()) or own(self, rows))
    manifest = rounds.rounds(told((copy, stores[1]), tmp_path / "out"))
    assert all_picks(tmp_path / "out") == all_picks(finished[0]) == asked
    assert [found["metrics"] for found in manifest["table"]] == [found["metrics"] for found in finished[1]["table"]]


def test_labels_that_change_after_a_round_don_t_reach_it(finished, stores, tmp_path):
    """After each round, the labels of all that is not picked yet become wrong, until just before they are paid for."""
    out, file = tmp_path / "out", tmp_path / "labels.csv"
    for number in range(3):
        known = flat(all_picks(finished[0], number + 1))
        lies = {row: 9 - int(FeatureStore(stores[0]).labels[row]) for row in range(600) if row not in known}
        labels_csv(stores, known, file, lie=lies)
        rounds.rounds(told(stores, out, oracle=str(file), rounds=number + 1))
    assert all_picks(out) == all_picks(finished[0])


def test_a_column_by_name(stores, tmp_path):
    with pytest.raises(InputError, match=r"have no column 'truth' \(one of: row, id, label\)"):
        rounds.rounds(told(stores, tmp_path / "out", oracle="column:truth"))


# --- what is refused before anything is computed


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"strategy": "entropi"}, "did you mean 'entropy'"),
        ({"strategy": "uniform"}, "nobody has paid for"),
        ({"strategy_option": ("aggregates=max",)}, "unknown option 'aggregates'"),
        ({"start_strategy": "entropy"}, "no model is trained yet"),
        ({"start": 0}, "--start: budget '0' must be positive"),
        ({"start": "1,2"}, "--start '1,2' names 2 budgets: it takes one"),
        ({"add": "1,2,3"}, "--add '1,2,3' names 3 budgets, and --rounds 3 has 2 after the start"),
        ({"start": 400, "add": "100,200"}, "--add 100, 200 and --rounds 3 want 700 labels, and there are 600 images"),
        ({"start": 400, "add": "100", "rounds": 4}, "want 700 labels, and there are 600 images: at most --rounds 3"),
        ({"oracle": "nowhere.csv"}, "--oracle 'nowhere.csv' does not exist"),
        ({"test": "nowhere"}, "nowhere does not exist"),
        ({"recipe": "isal-resnet18", "workers": 2}, "--recipe, --workers: for pools of images"),
        ({"fixed_features": True}, "--fixed-features: for pools of images"),
        ({"reference": "nowhere"}, "--reference is for --strategy influence and gradient_similarity, not for entropy"),
        ({"encoder_option": ("damp=0",)}, "--encoder-option is for --strategy influence"),
        ({"strategy": "stability"}, "reads what a detector says"),
        ({"strategy": "influence", "reference": "nowhere"}, "nowhere does not exist"),
        ({"strategy": "influence", "hold_out": "30"}, "--hold-out '30' is 30 of 30"),
        ({"strategy": "influence", "encoder_option": ("damper=0",)}, "unknown option 'damper'"),
        ({"strategy": "influence", "encoder_option": ("pseudo=expected",)}, "are for networks"),
        ({"strategy": "influence", "encoder_option": ("parameters=conv",)}, "matches none of the model's"),
    ],
)
def test_wrong_input_claims_no_folder(stores, tmp_path, given, words):
    with pytest.raises(InputError, match=words):
        rounds.rounds(told(stores, tmp_path / "out", **given))
    assert not (tmp_path / "out").exists()


def test_the_pool_itself_is_no_reference(stores, tmp_path):
    with pytest.raises(InputError, match="whose labels nobody has paid for"):
        rounds.rounds(told(stores, tmp_path / "out", strategy="influence", reference=stores[0]))


def test_the_pool_itself_is_no_test(stores, tmp_path):
    with pytest.raises(InputError, match="would be of vectors trained on"):
        rounds.rounds(told((stores[0], stores[0]), tmp_path / "out"))


def test_neither_pool_nor_features(finished, stores, tmp_path):
    with pytest.raises(InputError, match="is a selection folder: give a pool of images, or a feature store"):
        rounds.rounds(told((str(finished[0] / "round-00" / "selection"), stores[1]), tmp_path / "out"))


def test_the_command_tells_each_round(stores, tmp_path, capsys):
    line = [
        "rounds",
        *stores[:1],
        "--strategy",
        "random",
        "--oracle",
        "column",
        "--test",
        stores[1],
        "--out",
        str(tmp_path / "o"),
    ]
    line += ["--start", "30", "--add", "5%", "--rounds", "2", "--linear-epochs", "3", "--embed-workers", "0", "--quiet"]
    assert run(line) == 0
    out, _ = capsys.readouterr()
    assert "accuracy" in out
    assert f"{tmp_path}/o: 2 rounds by random, 60 labels" in out
    assert run([*line, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["already_done"], facts["rounds"], [found["labeled"] for found in facts["table"]]) == (True, 2, [30, 60])
    shutil.rmtree(tmp_path / "o" / "round-01")
    (tmp_path / "o" / "manifest.json").unlink()
    assert describe(str(tmp_path / "o"))["rounds_done"] == 1


def test_the_rate_of_the_linear_head():
    x, y = torch.eye(4), np.arange(4)
    start, slow, fast = (train_head(x, y, 4, 3, 0, rate).weight.detach() for rate in (1e-12, 1e-6, 1e-5))
    torch.testing.assert_close((fast - start) / (slow - start), torch.full((4, 4), 10.0), rtol=0.05, atol=0)
