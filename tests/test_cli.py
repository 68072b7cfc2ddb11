"""The command line: the same functions, mistakes without a traceback."""

import pytest

from mmjax import cli
from tests import small


def call(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["mmjax", *map(str, args)])
    cli.main()


def test_generate_prints_the_words(monkeypatch, capsys):
    call(monkeypatch, "generate", "--checkpoint", small.checkpoint(), "--image", small.images() / "image" / "0.jpg",
         "--prompt", "What is it?", "--max-new-tokens", 4)
    assert capsys.readouterr().out.strip()


def test_convert_and_export(monkeypatch, tmp_path):
    ckpt = small.GOLDEN / "ckpt"
    call(monkeypatch, "convert", "llama", "--llama", ckpt / "llama_hf", "--out", tmp_path / "llama")
    call(monkeypatch, "export", "--checkpoint", tmp_path / "llama", "--part", "llama", "--out", tmp_path / "hf")
    assert (tmp_path / "hf" / "config.json").is_file()


@pytest.mark.parametrize(("args", "message"), [
    (("generate", "--checkpoint", "nowhere", "--prompt", "Hi"), "nowhere"),
    (("generate", "--checkpoint", "nowhere", "--prompt", "Hi", "--dtype", "float99"), "dtype = 'float99'"),
    (("train", "--config", "nowhere.py"), "nowhere.py"),
    (("train",), "Name a config file"),
    (("convert", "llama", "--llama", "nowhere", "--out", "out"), "nowhere"),
])
def test_mistake_ends_with_one_message(monkeypatch, capsys, args, message):
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, *args)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_unreadable_image_is_named(monkeypatch, capsys, tmp_path):
    (tmp_path / "a.jpg").write_text("not an image")
    with pytest.raises(SystemExit):
        call(monkeypatch, "generate", "--checkpoint", small.checkpoint(), "--prompt", "Hi",
             "--image", tmp_path / "a.jpg")
    assert "a.jpg is not an image" in capsys.readouterr().err


def test_config_fields_are_overridden(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("mmjax.training.run.train", lambda config, score: seen.append(config))
    call(monkeypatch, "train", "--config", "configs/tiny_minigpt4.py", "--optim.init-lr", "0.5", "--out", tmp_path,
         "--data.scenes.count", "7")
    assert (seen[0].optim.init_lr, seen[0].out, seen[0].data.scenes.count) == (0.5, str(tmp_path), 7)


def test_a_path_on_the_command_line_replaces_a_mixture(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("mmjax.training.run.train", lambda config, score: seen.append(config))
    call(monkeypatch, "train", "--config", "configs/minigpt4_stage1.py", "--data.format", "tfds", "--data.path", "cc")
    assert (seen[0].data.format, seen[0].data.path, seen[0].data.mixture) == ("tfds", "cc", ())
    assert "--data.path replaces data.mixture of configs/minigpt4_stage1.py." in capsys.readouterr().err
    call(monkeypatch, "train", "--config", "configs/minigpt4_stage1.py", "--data.batch-size", "32")
    assert len(seen[1].data.mixture) == 2


def test_fields_of_a_phase_are_behind_its_name(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("mmjax.training.run.train_phases", lambda phases, score: seen.append(phases))
    call(monkeypatch, "train", "--config", "configs/tiny_imagebind_llm.py", "--finetune.optim.init-lr", "0.5",
         "--pretrain.out", tmp_path)
    assert list(seen[0]) == ["pretrain", "finetune"]
    assert (seen[0]["finetune"].optim.init_lr, seen[0]["pretrain"].out) == (0.5, str(tmp_path))
    assert seen[0]["pretrain"].optim.init_lr != 0.5


def test_commands_are_listed(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, "--help")
    assert stopped.value.code == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in cli.COMMANDS)


def test_help_of_train_needs_no_config(monkeypatch, capsys):
    call(monkeypatch, "train", "--help")
    assert "usage: train --config FILE" in capsys.readouterr().out
