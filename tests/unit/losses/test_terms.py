"""LossSum: what is trained, what is only measured."""

import pytest
import torch

from aiprod_ds.losses.terms import LossSum


def test_worked_number_of_the_docstring():
    total = LossSum()
    total.add("loss/a", 0.5, lambda: torch.tensor(2.0))
    total.add("loss/b", 0.0, lambda: torch.tensor(7.0))
    terms = total.finish()

    assert terms.total.item() == 1.0
    assert {name: value.item() for name, value in terms.terms.items()} == {
        "loss/total": 1.0,
        "loss/a": 2.0,
        "loss/b": 7.0,
    }


def test_a_term_of_weight_zero_builds_no_graph_and_cannot_poison_the_total():
    weight = torch.ones((), requires_grad=True)
    seen = []
    total = LossSum()
    total.add("loss/trained", 2.0, lambda: weight * 3)
    total.add("loss/measured", 0.0, lambda: seen.append(torch.is_grad_enabled()) or weight * float("nan"))
    terms = total.finish()
    terms.total.backward()

    assert seen == [False]
    assert weight.grad.item() == 6.0
    assert torch.isnan(terms.terms["loss/measured"])
    assert not any(value.requires_grad for value in terms.terms.values())


def test_no_graph_under_no_grad():
    total = LossSum()
    with torch.no_grad():
        total.add("loss/a", 1.0, lambda: torch.ones((), requires_grad=True) * 2)

    assert not total.finish().total.requires_grad


def test_the_record_is_frozen():
    total = LossSum()
    total.measure("latent/mean", torch.ones(()))
    total.add("loss/a", 1.0, lambda: torch.ones(()))
    with pytest.raises(AttributeError):
        total.finish().total = torch.zeros(())
