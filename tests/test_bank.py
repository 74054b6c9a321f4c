"""Banks that are rounded, or read from disk when they are used."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from moveimg.checkpoint import BUNDLED, load_generator
from moveimg.model.bank import DiskRows, QuantizedRows
from moveimg.pipeline import Pipeline
from moveimg.sampling import image_rngs, sample_codes


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_rows_are_within_their_rounding(bits):
    weight, codes = torch.randn(300, 6 * 32), torch.randint(300, (3, 5))
    weight[7] = 0
    rows = QuantizedRows.of(weight, 6, bits)
    error = (rows(codes) - weight[codes]).unflatten(-1, (6, 32)).abs()
    assert (error <= 0.501 * rows.scale[codes]).all()
    assert error.max() > 0 and not rows(torch.tensor([7])).any()
    assert rows.packed.numel() * rows.packed.itemsize == weight.numel() * bits // 8


@pytest.mark.parametrize(("bits", "width"), [(3, 32), (4, 31)])
def test_other_bits_and_odd_widths_are_refused(bits, width):
    with pytest.raises(ValueError, match=f"{bits} bits and width {width}"):
        QuantizedRows(10, 2, width, bits)


@pytest.mark.parametrize("bank", ["disk", "cpu"])
def test_a_bank_that_is_not_held_gives_the_same_codes_and_logits(bank):
    resident, other = (load_generator(BUNDLED / "fashion", bank=kind) for kind in (None, bank))
    codes, labels = torch.randint(1024, (2, 64)), torch.tensor([1, 8])
    with torch.inference_mode():
        assert torch.equal(resident(codes, labels), other(codes, labels))
    assert not any("bank" in name for name, _ in other.named_parameters())
    pipelines = [Pipeline.from_pretrained("digits", device="cpu", bank=k) for k in (None, bank)]
    drawn = [sample_codes(p.decoder, labels, p.sampling, image_rngs([0, 1])) for p in pipelines]
    assert torch.equal(*drawn)


def test_a_quantized_bank_changes_logits_a_little():
    codes, labels = torch.randint(1024, (2, 64)), torch.tensor([1, 8])
    with torch.inference_mode():
        exact, *rounded = (
            load_generator(BUNDLED / "fashion", bank=kind)(codes, labels)
            for kind in (None, "int8", "int4")
        )
    errors = [(exact - other).abs().mean() for other in rounded]
    assert 0 < errors[0] < errors[1] < exact.std()


def test_unknown_forms_models_without_bank_and_other_tensors_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'int3'"):
        load_generator(BUNDLED / "digits", bank="int3")
    save_file({"a": torch.zeros(3, 2, dtype=torch.int64)}, tmp_path / "x.safetensors")
    for name in ("a", "b"):
        with pytest.raises(ValueError, match=f"'{name}'"):
            DiskRows(tmp_path / "x.safetensors", name)
