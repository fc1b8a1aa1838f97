"""evaluate.py: its command line, its table, its files, and what it answers to a mistake."""

import json
import math
import re
import sys

import processes
import pytest
import torch
from make import narrow_networks, shapes, write_cifar, write_folders
from PIL import Image

import evaluate
import train
from plumbing.encoders import load_encoder
from plumbing.run_files import read_log


@pytest.fixture(scope="module", autouse=True)
def narrow():
    """The smallest transformer with a quarter of its width: most of what is run here is its steps."""
    with narrow_networks({"dim": 24, "depth": 6, "heads": 3}):
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of magma on a tiny CIFAR-10: (run folder, data folder)."""
    root = tmp_path_factory.mktemp("data")
    write_cifar(root, "cifar10", counts=(30, 30), test=40)
    write_cifar(root, "cifar100", counts=(30, 30), test=40)
    run = tmp_path_factory.mktemp("runs") / "magma-cifar10"
    flags = "--model vit_micro --epochs 1 --batch-size 20 --decoder-depth 1 --probe-every 1 --amp off"
    assert train.main(f"magma --data cifar10 --root {root} --out {run} {flags}".split()) == 0
    return run, root


def add_an_epoch(run):
    """One more line in a log, for curves; a run of one epoch has none, which spares every other report the drawing."""
    path = run / "log.jsonl"
    last = json.loads(path.read_text().splitlines()[-1])
    path.write_text(path.read_text() + json.dumps(last | {"epoch": last["epoch"] + 1}) + "\n")


def lines_of(run):
    return [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]


@pytest.fixture
def run_folder(finished, tmp_path):
    """A copy that a test may write into."""
    for file in finished[0].iterdir():
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "run"


def test_evaluate_prints_a_table_and_appends_a_line_a_protocol(run_folder, capsys):
    argv = f"{run_folder} --protocol knn linear clusters --untrained --pixels --epochs 2".split()
    assert evaluate.main(argv) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[-2:] == [
        "Davies-Bouldin: lower is better",
        "linear of raw pixels: by ridge regression, whatever the recipe",
    ]
    table = table[:-2]
    assert [line[:20].strip() for line in table[-4:]] == ["", "trained encoder", "untrained encoder", "raw pixels"]
    for title in ("kNN", "linear", "Davies-Bouldin", "cosine ratio", "cosine gap"):
        assert title in table[-4]
    lines = lines_of(run_folder)
    assert [line["protocol"] for line in lines] == ["knn", "linear", "clusters"]
    for line in lines:
        assert line["results"].keys() == {"trained", "untrained", "pixels"}
        assert line["data"] == "cifar10"
        assert (line["train_images"], line["test_images"]) == (60, 40)
        assert line["settings"]["seed"] == 0
    assert lines[1]["settings"]["epochs"] == 2
    assert f"{lines[0]['results']['trained']['knn']:.1f}" in table[-3]
    report = (run_folder / "report.html").read_text()
    last = read_log(run_folder / "log.jsonl")[1][-1]["epoch"]
    assert [line["epoch"] for line in lines] == [last] * 3
    for caption in ("knn on cifar10", "linear on cifar10, recipe magma"):
        assert f"<p>{caption}, after epoch {last}</p>" in report
    assert evaluate.main(argv[:3]) == 0
    shown = capsys.readouterr().out
    assert "--untrained adds what the encoder knew before" in shown and "--pixels adds what raw pixels say" in shown
    again = lines_of(run_folder)
    assert len(again) == 4
    assert again[-1]["results"]["trained"] == lines[0]["results"]["trained"]  # the same figure twice


def test_evaluate_knn_is_the_figure_that_the_training_logged(run_folder):
    assert evaluate.main([str(run_folder), "--protocol", "knn", "--untrained", "--pixels", "--amp", "off"]) == 0
    results = lines_of(run_folder)[0]["results"]
    log = read_log(run_folder / "log.jsonl")[1]
    assert results["trained"]["knn"] == log[-1]["knn"]
    assert results["untrained"]["knn"] == log[0]["knn"]
    assert results["pixels"]["knn"] == log[0]["pixels"]["knn"]


def test_evaluate_needs_the_encoder_file_alone(run_folder, finished, capsys):
    for file in ("config.json", "last.pt", "log.jsonl"):
        (run_folder / file).unlink()
    assert evaluate.main([str(run_folder)]) == 2
    assert "has no config.json to tell the data set; give --data" in capsys.readouterr().err
    data = ["--data", "cifar10", "--root", str(finished[1])]
    assert evaluate.main([str(run_folder), *data, "--protocol", "knn", "pictures"]) == 0
    out = capsys.readouterr().out
    assert "no reconstructions" in out
    assert "no curves" in out


def test_evaluate_transfers_to_another_set_and_size(run_folder, finished, tmp_path):
    where = [str(run_folder), "--protocol", "knn"]
    assert evaluate.main([*where, "--data", "cifar100", "--root", str(finished[1])]) == 0
    folders = write_folders(tmp_path / "folders", train=12, size=(50, 40))
    assert evaluate.main([*where, "--data", str(folders), "--workers", "0"]) == 0
    assert evaluate.main([*where, "--image-size", "16", "--pool", "cls"]) == 0
    lines = lines_of(run_folder)
    assert [line["data"] for line in lines] == ["cifar100", str(folders), "cifar10"]
    assert lines[2]["settings"]["image_size"] == 16


def test_evaluate_tests_elsewhere_on_classes_of_the_same_name(run_folder, tmp_path, capsys):
    """MLO-MAE, Table 15: what was fine-tuned is judged by other pictures, and not trained again."""
    folders = write_folders(tmp_path / "folders", ("ant", "bee", "cat"), train=12, val=1)
    other = tmp_path / "other"
    for name, colour in (("cat", (160, 30, 90)), ("bee", (100, 30, 90)), ("dog", (0, 0, 0))):  # colours of training
        (other / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (30, 20), colour).save(other / name / f"{i}.png")
    argv = f"{run_folder} --data {folders} --workers 0 --amp off --epochs 1 --batch-size 36".split()
    elsewhere = [*argv, "--protocol", "knn", "finetune", "--k", "1", "--test-data", str(other)]
    assert evaluate.main(elsewhere) == 2
    message = "finetune-folders is not at its end; run --protocol finetune without --test-data first"
    assert message in capsys.readouterr().err and not (run_folder / "finetune-folders").exists()
    assert evaluate.main([*argv, "--protocol", "finetune"]) == 0
    files = [run_folder / "finetune-folders" / name for name in ("last.pt", "encoder.pt", "log.jsonl")]
    before = [path.read_bytes() for path in files]
    capsys.readouterr()
    assert evaluate.main(elsewhere) == 0
    told = capsys.readouterr().out
    assert f"tested on 6 images of {other}, of 2 of the 3 classes of training" in told
    assert f"1 folders of {other}, such as dog, are no class of training: left out" in told
    assert [path.read_bytes() for path in files] == before
    lines = lines_of(run_folder)
    assert [line["protocol"] for line in lines] == ["finetune", "knn", "finetune"]
    assert [(line["data"], line["test_images"]) for line in lines] == [
        (str(folders), 3),
        (str(other), 6),
        (str(other), 6),
    ]
    assert lines[1]["results"]["trained"]["knn"] == 100


def test_evaluate_finetunes_beside_scratch_and_resumes(run_folder, capsys):
    argv = f"{run_folder} --protocol finetune --epochs 1 --batch-size 30 --amp off".split()
    assert evaluate.main([*argv, "--untrained"]) == 0
    assert lines_of(run_folder)[-1]["results"].keys() == {"trained", "untrained"}
    before = (run_folder / "finetune-cifar10" / "last.pt").read_bytes()
    capsys.readouterr()
    assert evaluate.main(argv) == 2
    assert "finetune-cifar10 exists; add --resume to go on with it" in capsys.readouterr().err
    assert evaluate.main([*argv, "--resume"]) == 0
    assert (run_folder / "finetune-cifar10" / "last.pt").read_bytes() == before
    assert evaluate.main([*argv, "--scratch", "--out", str(run_folder / "more")]) == 0
    line = lines_of(run_folder)[-1]
    assert line["results"] == {"untrained": lines_of(run_folder)[0]["results"]["untrained"]}
    assert [path.name for path in (run_folder / "more").iterdir()] == ["finetune-cifar10-untrained"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("{tmp}/none", "no run folder {tmp}/none; give one that train.py wrote"),
        ("{tmp}", "{tmp} holds no encoder.pt"),
        ("--protocol knn", "give the run folder first: python evaluate.py RUN --protocol knn"),
        ("{run} --protocol knm", "unknown protocol 'knm'; did you mean 'knn'"),
        ("{run} --protocols knn", "unknown flag '--protocols'; did you mean --protocol?"),
        ("{run} --recipe finolla", "unknown recipe of knn linear 'finolla'; did you mean 'finola'"),
        ("{run} --protocol finetune --recipe magma", "unknown recipe of finetune 'magma'; choose from"),
        ("{run} --protocol knn --recipe mae", "unknown recipe of knn 'mae'; choose from none"),
        ("{run} --protocol linear --recipe mae --batch-size 1", "--batchnorm needs two images in each part"),
        ("{run} --data cifar11", "unknown dataset 'cifar11'"),
        ("{run} --test-data {tmp}/none", "no folder {tmp}/none; --test-data takes a folder that holds one for each"),
        ("{run} --test-data {tmp}", "{tmp} has no folder with images that is named as a class of training is, such as"),
        ("{run} --protocol knn features --test-data {tmp}", "--protocol features is a command of its own"),
        ("{run} --protocol pictures --test-data {tmp}", "--test-data is for knn linear clusters tran1 tran4 finetune"),
        ("{run} --data stl10", "no stl10 at data/stl10_binary; give the --root that holds stl10_binary"),
        ("{run} --image-size 30", "image size 30 x 30 is not a multiple of the patch size 4"),
        ("{run} --k 0", "--k 0 makes no sense"),
        ("{run} --protocol knn --k 61", "--k 61 is more than the 60 training images"),
    ],
)
def test_evaluate_answers_a_mistake_with_one_line_and_code_2(argv, message, finished, tmp_path, capsys):
    run, _ = finished
    assert evaluate.main(argv.format(tmp=tmp_path, run=run).split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: " + message.format(tmp=tmp_path, run=run))
    assert err.count("\n") == 1


def test_evaluate_names_a_damaged_encoder(run_folder, capsys):
    (run_folder / "encoder.pt").write_bytes(b"nothing")
    assert evaluate.main([str(run_folder)]) == 2
    assert f"{run_folder}/encoder.pt is not a checkpoint" in capsys.readouterr().err


def test_evaluate_looks_for_old_folders_before_it_starts(run_folder, capsys):
    (run_folder / "finetune-cifar10").mkdir()
    (run_folder / "finetune-cifar10" / "log.jsonl").touch()
    assert evaluate.main([str(run_folder), "--protocol", "knn", "finetune"]) == 2
    assert "finetune-cifar10 exists" in capsys.readouterr().err
    assert not (run_folder / "eval.jsonl").exists()


def test_evaluate_prints_what_it_has_when_a_protocol_fails(run_folder, capsys):
    assert evaluate.main([str(run_folder), "--protocol", "knn", "linear", "--base-lr", "1e38"]) == 1
    assert "trained encoder" in capsys.readouterr().out
    assert [line["protocol"] for line in lines_of(run_folder)] == ["knn"]


def test_notes_name_only_flags_that_would_add_something():
    trained, pixels = {"trained": {"knn": 1.0}}, {"pixels": {"knn": 1.0}}
    untrained = {"untrained": {"knn": 1.0}}
    assert len(evaluate.notes_on(trained, ["knn"])) == 2
    assert evaluate.notes_on(trained | untrained | pixels, ["knn"]) == []
    assert evaluate.notes_on(trained, ["energy"]) == []
    assert evaluate.notes_on(trained, ["tran1"]) == ["--untrained adds what the encoder knew before"]
    ignored = evaluate.notes_on(trained | untrained | {"pixels": {}}, ["finetune"])
    assert ignored == ["--pixels is for knn, linear, clusters and segment alone"]


def test_evaluate_loads_no_unlabelled_images(run_folder, monkeypatch):
    splits, load = [], evaluate.load_data
    monkeypatch.setattr(
        evaluate, "load_data", lambda *args, **more: splits.append(more["split"]) or load(*args, **more)
    )
    assert evaluate.main([str(run_folder), "--protocol", "knn"]) == 0
    assert splits == ["labelled", "test"]


def test_evaluate_counts_the_images_that_it_used(run_folder):
    assert evaluate.main([str(run_folder), "--protocol", "knn", "--probe-images", "33"]) == 0
    assert (lines_of(run_folder)[0]["train_images"], lines_of(run_folder)[0]["test_images"]) == (33, 33)


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"data": 5}', '{"data": "shapes", "image_size": "x"}', "\x00"])
def test_evaluate_survives_a_damaged_config(run_folder, text, capsys):
    (run_folder / "config.json").write_text(text)
    assert evaluate.main([str(run_folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_evaluate_ignores_settings_that_it_does_not_know_and_imports_no_stranger(run_folder, capsys):
    path = run_folder / "config.json"
    settings = json.loads(path.read_text()) | {"of_a_later_version": [1]}
    path.write_text(json.dumps(settings | {"method": "antigravity"}))
    assert evaluate.main([str(run_folder), "--protocol", "knn", "pictures"]) == 0
    assert "reconstructions.png" not in capsys.readouterr().out
    assert "antigravity" not in sys.modules


def test_pictures_go_on_without_reconstructions_that_do_not_fit(run_folder, capsys):
    add_an_epoch(run_folder)
    settings = json.loads((run_folder / "config.json").read_text())
    (run_folder / "config.json").write_text(json.dumps(settings | {"decoder_dim": 32}))
    assert evaluate.main([str(run_folder), "--protocol", "pictures"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"no reconstructions: config.json and last.pt of \S+ do not fit each other \([^\n]*\)\n", out)
    assert "curves.png" in out


def test_evaluate_stops_at_a_loss_that_is_not_finite(run_folder, capsys):
    argv = [str(run_folder), "--protocol", "linear"]
    assert evaluate.main([*argv, "--base-lr", "1e38"]) == 1
    assert "the loss is not finite; lower --base-lr" in capsys.readouterr().err
    assert not (run_folder / "eval.jsonl").exists()
    assert evaluate.main([*argv, "--base-lrs", "0.1", "1e38"]) == 0
    assert lines_of(run_folder)[0]["results"]["trained"]["linear 1e+38"] is None
    assert "note: linear 1e+38: the head diverged" in capsys.readouterr().out


def test_evaluate_help_lists_the_flags(capsys):
    for argv in ([], ["--help"]):
        assert evaluate.main(argv) == 0
        shown = capsys.readouterr().out
        assert "--layer-decay LAYER_DECAY" in shown
        assert "--pool {cls,mean}" in shown and "--optimizer {sgd,lars,adamw}" in shown


def test_evaluate_in_two_processes_equals_one(run_folder, finished):
    """kNN and the cached probe on process 0, fine-tuning on both: the same figures as in one process."""
    flags = "--protocol knn linear finetune --epochs 1 --batch-size 20 --amp off --randaugment 0 --mixup 0 --cutmix 0"
    flags += " --drop-path 0 --crop-min 1 --flip 0"
    argv = [str(run_folder), *flags.split(), "--out"]
    assert evaluate.main([*argv, str(run_folder / "one")]) == 0
    codes = processes.start(processes.evaluate_main, [*argv, str(run_folder / "two")])
    assert codes == [0, 0]
    one, two = lines_of(run_folder)[:3], lines_of(run_folder)[3:]
    assert [line["protocol"] for line in two] == ["knn", "linear", "finetune"]
    assert [line["results"] for line in two] == [line["results"] for line in one]
    weights = [load_encoder(run_folder / n / "finetune-cifar10" / "encoder.pt").state_dict() for n in ("one", "two")]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=1e-5)


def test_evaluate_draws_every_picture(run_folder, capsys):
    """Of a run with a setting that a later version has, too."""
    add_an_epoch(run_folder)
    path = run_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"of_a_later_version": [1]}))
    assert evaluate.main([str(run_folder), "--protocol", "pictures"]) == 0
    out = capsys.readouterr().out
    # Pictures in a row: of the method; of an image with three heads, or six blocks.
    columns = {"reconstructions": 3, "attention": 4, "keys": 7, "features": None, "curves": None}
    for name, count in columns.items():
        path = run_folder / "pictures" / f"{name}.png"
        assert f"wrote {path}" in out
        with Image.open(path, formats=["PNG"]) as image:
            assert min(image.size) > 250
            assert len(image.getcolors(image.size[0] * image.size[1])) > 20  # something is on it
            assert count is None or image.width == 4 + count * 132
    assert not (run_folder / "eval.jsonl").exists()
    report = (run_folder / "report.html").read_text()
    assert all(f'alt="pictures/{name}.png"' in report for name in ("attention", "keys"))


def test_a_run_of_three_levels_is_trained_and_evaluated(tmp_path, monkeypatch):
    """MLO-MAE logs what no other method does, and is judged as any other."""
    for command in (train, evaluate):
        monkeypatch.setattr(command, "load_data", lambda *_, split, **__: shapes(120, 32, seed=split == "test"))
    argv = ["mlo_mae", "--epochs", "1", "--out", str(tmp_path / "run"), "--model", "vit_micro", "--patch", "16"]
    argv += ["--batch-size", "20", "--probe-images", "100", "--hidden", "8", "--unrolling", "1"]
    assert train.main(argv) == 0
    last = read_log(tmp_path / "run" / "log.jsonl")[1][-1]
    names = {"loss", "loss_head", "loss_validation", "probability", "entropy", "accuracy", "object", "linear"}
    assert names < set(last)
    assert math.isfinite(last["loss_validation"]) and last["loss_validation"] > 0
    assert evaluate.main([str(tmp_path / "run"), "--protocol", "knn", "pictures", "--probe-images", "50"]) == 0
    assert (tmp_path / "run" / "pictures" / "reconstructions.png").exists()


def test_a_line_that_a_kill_cut_short_spoils_no_other(run_folder):
    argv = f"{run_folder} --protocol knn --device cpu".split()
    assert evaluate.main(argv) == 0
    with open(run_folder / "eval.jsonl", "a") as file:
        file.write('{"protocol": "kn')
    assert evaluate.main(argv) == 0
    first, _, last = (run_folder / "eval.jsonl").read_text().splitlines()
    assert json.loads(first)["results"] == json.loads(last)["results"]


def test_other_pictures_than_the_runs_are_told_where_none_are_asked_for(run_folder, tmp_path, capsys):
    argv = f"{run_folder} --protocol knn --device cpu".split()
    assert evaluate.main(argv) == 0
    assert "note:" not in capsys.readouterr().out
    images = run_folder / "images.tsv"
    images.write_bytes(images.read_bytes().replace(b"data_batch_2.bin", b"caf\xe9.bin"))
    assert evaluate.main(argv) == 0
    told = f"note: 1 training images, such as data_batch_2.bin, are not those of {run_folder}; give another --data\n"
    assert told in capsys.readouterr().out
    root = json.loads((run_folder / "config.json").read_text())["root"]
    assert evaluate.main([*argv, "--data", "cifar10", "--root", root]) == 0
    assert "note:" not in capsys.readouterr().out
    images.unlink()  # a run of before they were listed
    assert evaluate.main(argv) == 0
    assert "note:" not in capsys.readouterr().out


def test_protocols_that_need_labels_say_so_where_there_are_none(tmp_path, capsys):
    root = tmp_path / "flat"
    root.mkdir()
    for i in range(12):
        Image.new("RGB", (9, 9), (i * 20, 9, 99)).save(root / f"{i}.png")
    flags = "--image-size 8 --patch 4 --batch-size 4 --epochs 1 --warmup-epochs 0 --workers 0 --device cpu"
    data = ["--data", str(root), "--recipe", "shapes"]
    assert train.main(["magma", *data, *flags.split(), "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "without labels         held-out loss   effective rank\ntrained encoder" in said
    assert f"next: python evaluate.py {tmp_path / 'run'} --protocol features" in said
    for protocol in ("knn", "linear", "clusters", "tran1", "finetune"):
        assert evaluate.main([str(tmp_path / "run"), "--protocol", protocol, "--workers", "0"]) == 2
        text = capsys.readouterr().err
        assert text == f"error: {protocol}: these images have no labels; --protocol features or pictures need none\n"
    assert evaluate.main([str(tmp_path / "run"), "--protocol", "pictures", "--workers", "0"]) == 0


def test_help_shows_the_values_that_a_protocol_takes_for_a_run(run_folder, capsys):
    for flags, expected in (
        (
            "--protocol finetune",
            ["finetune by the recipe 'mae'", "(default: 0.75)", "RandAugment, of 10; 0 for off (default: 9.0)"],
        ),
        (
            "--protocol finetune --recipe photos --epochs 4",
            ["by the recipe 'photos'", "(default: 0.016)", "(default: 4)"],
        ),
        ("--protocol linear", ["linear by the recipe 'magma'", "(default: 60 80)"]),
        ("--protocol knn", ["--protocol knn.", "was trained with (default: 0)"]),
    ):
        assert evaluate.main([str(run_folder), *flags.split(), "--help"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert all(part in text for part in expected), text
    assert not (run_folder / "eval.jsonl").exists()


def test_a_run_by_the_recipe_of_photos_is_judged_by_that_recipe(tmp_path, capsys):
    root = write_folders(tmp_path / "set", train=6, val=3)
    flags = "--recipe photos --image-size 8 --patch 4 --batch-size 4 --max-steps 2 --workers 0 --device cpu"
    assert train.main(["magma", "--data", str(root), *flags.split(), "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    judged = "--protocol linear finetune --epochs 2 --epoch-steps 3 --batch-size 4 --workers 0 --device cpu"
    assert evaluate.main([str(tmp_path / "run"), *judged.split()]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "note: linear: --epochs 2 shortens the recipe of 20: --milestones 12 16 -> 1 2" in said
    assert "note: --epochs 2 shortens the recipe of 20: --warmup-epochs 2 -> 0" in said
    assert evaluate.main([str(tmp_path / "run"), "--protocol", "linear", "--max-steps", "150", "--workers", "0"]) == 0
    assert "note: linear: --max-steps 150 leaves 1 epoch(s) of 100 steps; probes take 128" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "run" / "eval.jsonl").read_text().splitlines()]
    assert [line["settings"]["recipe"] for line in lines] == ["photos"] * 3
    assert [line["settings"]["epoch_steps"] for line in lines] == [3, 3, 100]
    assert len(read_log(tmp_path / "run" / "finetune-set" / "log.jsonl")[1]) == 3


def test_nothing_is_written_among_the_pictures(tmp_path, capsys):
    root = write_folders(tmp_path / "set", train=6, val=3)
    flags = "--recipe photos --image-size 8 --patch 4 --batch-size 4 --max-steps 2 --workers 0 --device cpu"
    assert train.main(["magma", "--data", str(root), *flags.split(), "--out", str(tmp_path / "run")]) == 0
    before = sorted(root.rglob("*"))
    for place in (root / "train", root / "val" / "ant" / "new"):
        argv = [str(tmp_path / "run"), "--protocol", "pictures", "--workers", "0", "--out", str(place)]
        assert evaluate.main(argv) == 2
        assert capsys.readouterr().err.startswith(f"error: the folder {place} lies among the images of {root}/")
    assert sorted(root.rglob("*")) == before
