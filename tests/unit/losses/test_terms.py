"""LossSum: what is trained, what is only measured."""

import pytest
import torch

from aiprod_ds.losses.terms import LossSum, graph_for


def test_worked_number_of_the_docstring():
    total = LossSum()
    total.add("loss/a", 0.5, torch.tensor(2.0))
    total.add("loss/b", 0.0, torch.tensor(7.0))
    terms = total.finish()

    assert terms.total.item() == 1.0
    assert {name: value.item() for name, value in terms.terms.items()} == {
        "loss/total": 1.0,
        "loss/a": 2.0,
        "loss/b": 7.0,
    }


def test_a_term_of_weight_zero_builds_no_graph_and_cannot_poison_the_total():
    weight = torch.ones((), requires_grad=True)
    total = LossSum()
    with graph_for(2.0):
        trained = weight * 3
    total.add("loss/trained", 2.0, trained)
    with graph_for(0.0):
        measured = weight * float("nan")
    total.add("loss/measured", 0.0, measured)
    terms = total.finish()
    terms.total.backward()

    assert trained.requires_grad
    assert not measured.requires_grad
    assert weight.grad.item() == 6.0
    assert torch.isnan(terms.terms["loss/measured"])
    assert not any(value.requires_grad for value in terms.terms.values())


def test_no_graph_under_no_grad():
    with torch.no_grad(), graph_for(1.0):
        value = torch.ones((), requires_grad=True) * 2

    assert not value.requires_grad
    assert torch.is_grad_enabled()


def test_the_record_is_frozen():
    total = LossSum()
    total.measure("latent/mean", torch.ones(()))
    total.add("loss/a", 1.0, torch.ones(()))
    with pytest.raises(AttributeError):
        total.finish().total = torch.zeros(())
