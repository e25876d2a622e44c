"""Interleaved documents in a training run."""

import pytest
import torch
from train_fixtures import DOCUMENT_CODES, DOCUMENT_LENGTH, MIXED, VOCABULARY, tiny_config, tiny_table, write_documents

from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Modality
from unidiff.train.config import ObjectiveConfig, TaskConfig, TasksConfig
from unidiff.train.data.shard_source import DocumentTokens
from unidiff.train.data.tasks import TaskMixer, pack_tasks
from unidiff.train.trainer import Trainer

SIZE, LENGTH = DOCUMENT_CODES, DOCUMENT_LENGTH


@pytest.fixture
def documents(tmp_path) -> DocumentTokens:
    return DocumentTokens(str(write_documents(tmp_path / "documents")), seed=3)


def mixer(documents: DocumentTokens, share: float = 0.5) -> TaskMixer:
    tasks = TasksConfig(TaskConfig(1.0, loss="elbo"), TaskConfig(1.0), TaskConfig(1.0))
    return TaskMixer(tiny_table(), tasks, ObjectiveConfig(), seed=3, documents=documents, document_share=share)


def test_positions_and_targets(documents):
    batch = documents.fetch(torch.arange(12))
    assert batch.shape == (12, LENGTH) and torch.equal(batch.targets, batch.valid)
    for row in range(12):
        n = int(batch.valid[row].sum())
        assert torch.equal(batch.positions[row, :n, 0], torch.arange(n))
        image = batch.modality[row] == Modality.IMAGE
        assert int(image.sum()) % SIZE == 0
        grid = batch.positions[row][image][:, 1:].view(-1, 3, 3, 2)  # every picture counts its own rows and columns
        rows = torch.arange(3)[:, None].expand(3, 3)
        assert (grid[..., 0] == rows).all() and (grid[..., 1] == rows.T).all()
        assert ((batch.ids[row][image] - VOCABULARY.image[0]) < 16).all()
    counts = [int((b == Modality.IMAGE).sum()) // SIZE for b in batch.modality]
    assert sorted(counts) == sorted(n % 4 for n in range(12))


def test_samples_do_not_depend_on_how_they_are_asked_for(documents):
    made = mixer(documents)
    together = made.batch(0, 16)
    alone = [made.batch(n, 1) for n in range(16)]

    def keys(batch):
        return [
            (tuple(ids[ok].tolist()), tuple((noise < rate)[ok].tolist()), tuple(weight[ok].tolist()))
            for ids, ok, noise, rate, weight in zip(
                batch.batch.ids, batch.batch.valid, batch.noise, batch.rate, batch.weight, strict=True
            )
        ]

    assert sorted(keys(together)) == sorted(key for one in alone for key in keys(one))
    assert keys(mixer(documents).batch(0, 16)) == keys(together)


def test_the_share_is_exact_and_rates_cover_everything(documents):
    made = mixer(documents, 0.25)
    found = made.batch(0, 1000)
    long = (~found.batch.given & found.batch.valid).sum(1) != 14  # pairs have 5 text targets and 9 codes, or fewer
    is_document = found.batch.ids[:, 0] != 1  # a pair begins with its task token
    assert int(is_document.sum()) == 250 and long.any()
    rates = found.rate[is_document].sort().values
    assert (rates - (torch.arange(250) + 0.5) / 250).abs().max() < 0.02
    hidden = (found.noise < found.rate[:, None]) & found.batch.targets
    total = found.batch.targets.sum(1)
    assert torch.equal(hidden.sum(1), (found.rate * total).ceil().long())


def test_packed_documents_train_as_apart(documents):
    """Losses per token are equal, and a token's gradient stays inside of its document."""
    torch.manual_seed(0)
    model = MaskedTransformer(VOCABULARY.size, hidden_size=16, num_layers=2, num_heads=2).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    apart = mixer(documents).batch(0, 12)
    packed = pack_tasks(apart, 48)
    assert len(packed.batch.ids) < 12

    def features(batch):
        return model.hidden(batch.ids, batch.modality, batch.positions, batch.attention_mask())

    one, other = features(apart.batch)[apart.batch.valid], features(packed.batch)[packed.batch.valid]
    order = lambda x: x[x[:, 0].argsort()]  # noqa: E731 (rows are packed in another order)
    torch.testing.assert_close(order(one), order(other))
    embedded = model.embed(packed.batch.ids, packed.batch.modality).detach().requires_grad_()
    model.embed = lambda *args, **kwargs: embedded
    features(packed.batch)[0, 0].square().sum().backward()
    touched = embedded.grad[0].abs().sum(-1) > 0
    assert torch.equal(touched, packed.batch.sample_ids[0] == packed.batch.sample_ids[0, 0])


@pytest.mark.parametrize("pack", [0, 48])
def test_a_run_and_its_continuation(tmp_path, documents, pack):
    settings = [*MIXED, f"data.pack={pack}", "precision=fp32", "batch_size=6", "checkpoint.every=3", "logging.every=2"]

    def run(name, steps):
        config = tiny_config(tmp_path / name, *settings, "steps=6")
        trainer = Trainer(config, tiny_table(), documents=documents)
        if steps < 6:
            train, count = trainer.step, iter(range(steps))

            def stopping(factor):
                if next(count, None) is None:
                    raise KeyboardInterrupt
                return train(factor)

            trainer.step = stopping
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            return None
        trainer.train()
        return trainer.model.state_dict()

    whole = run("whole", 6)
    run("cut", 4)
    again = run("cut", 6)
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    assert (tmp_path / "whole" / "skipped.json").is_file()


def test_a_lost_shard_is_replaced_and_named(tmp_path):
    folder = write_documents(tmp_path / "documents")
    documents = DocumentTokens(str(folder))
    (folder / "00001.tar").unlink()
    assert documents.fetch(torch.arange(24)).shape == (24, LENGTH)
    assert documents.report.counts == {"missing_shard": 1} and documents.rows == 12


def test_what_does_not_fit(tmp_path, documents):
    other = DocumentTokens(str(write_documents(tmp_path / "other", grid=(1, 9))))
    with pytest.raises(ValueError, match="another vocabulary or grid"):
        mixer(other)
    with pytest.raises(ValueError, match="differ in vocabulary or grid"):
        DocumentTokens(f"{tmp_path / 'documents'}@1::{tmp_path / 'other'}@1")
    with pytest.raises(FileNotFoundError, match="'nowhere' does not exist; expected a folder of token shards"):
        DocumentTokens("nowhere")
    with pytest.raises(ValueError, match=r"data.document_share = 1.0 must lie between 0 and 1"):
        tiny_config(tmp_path, "data.documents=x", "data.document_share=1")
    causal = "model={hidden_size: 32, num_layers: 2, num_heads: 2, attention: block_causal, block_length: 3}"
    with pytest.raises(ValueError, match="documents have no blocks"):
        Trainer(tiny_config(tmp_path / "c", causal), tiny_table(), documents=documents)
