"""P2P against the paper's formulas in plain lines, and its published numbers of parameters."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.backbones import TINY, tiny_inputs
from support.properties import adapt, assert_close, move, output
from torch import Tensor
from transformers import DeiTConfig, DeiTForImageClassification

from peft_lab.adapters import P2PConfig
from peft_lab.adapters.input.p2p.encoder import point_features, start_values
from peft_lab.adapters.input.p2p.method import P2PLayer
from peft_lab.adapters.input.p2p.projection import grid_cells, neighbours, scattered, splat, turned, view_angles
from peft_lab.errors import ConfigError


def clouds(batch: int = 2, points: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(batch, points, 3, generator=torch.Generator().manual_seed(seed))


def encoder_of(model: Any) -> P2PLayer:
    return next(module for module in model.modules() if isinstance(module, P2PLayer) and module.is_encoder)


# Geometry -------------------------------------------------------------------------------------------------------------


def test_neighbours_are_those_of_a_plain_loop() -> None:
    cloud = clouds(1)[0]
    found = neighbours(cloud[None], 5)[0].tolist()
    for query, point in enumerate(cloud.tolist()):
        distances = [math.dist(point, other) for other in cloud.tolist()]
        assert found[query] == sorted(range(len(distances)), key=distances.__getitem__)[:5]
        assert found[query][0] == query
    assert neighbours(cloud[None], 99).shape == (1, 24, 24)


@pytest.mark.parametrize("side", [4, 9, 32])
@pytest.mark.parametrize("stretch", [(1, 1, 1), (50, 1, 1), (1, 50, 1), (0, 0, 1)])
def test_cells_lie_on_the_grid_and_keep_the_ratio(side: int, stretch: tuple[int, ...]) -> None:
    views = clouds(3, 200) * torch.tensor(stretch)
    cells = grid_cells(views, side)
    covered = splat(cells, side)
    assert covered.min() >= 0
    assert covered.max() <= side * side - 1
    rows, columns = covered // side, covered % side
    assert 0 <= rows.min() <= rows.max() <= side - 1
    assert 0 <= columns.min() <= columns.max() <= side - 1
    for cloud, found in zip(views.tolist(), cells.tolist(), strict=True):
        xs, ys = [p[0] for p in cloud], [-p[1] for p in cloud]
        step = max(max(xs) - min(xs), max(ys) - min(ys)) / (side - 3) or 1
        extents = [max(math.floor((v - min(axis)) / step) for v in axis) for axis in (xs, ys)]
        for number, axis in enumerate((xs, ys)):
            shift = (side - 3 - min(extents[number], side - 3)) // 2
            wanted = [math.floor((v - min(axis)) / step) + shift for v in axis]
            # a point on the edge of a cell may be rounded to its neighbour
            assert max(abs(a[number] - b) for a, b in zip(found, wanted, strict=True)) <= 1


def test_sums_at_pixels_are_those_of_a_plain_loop() -> None:
    features, cells = torch.randn(2, 24, 5), grid_cells(clouds(), 10)
    expected = torch.zeros(2, 5, 13, 13)
    for row in range(2):
        for point in range(24):
            column, line = cells[row, point].tolist()
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    # one pixel of margin for the offsets, and a border of (13 - 10) // 2
                    expected[row, :, line + down + 1 + 1, column + right + 1 + 1] += features[row, point]
    assert_close(scattered(features, cells, 10, 13), expected)


def test_the_upper_side_is_drawn_above_and_tilts_towards_the_viewer() -> None:
    cloud = torch.tensor([[[0.0, 1.0, 0.0], [0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]])
    zero = torch.zeros(1)
    assert_close(turned(cloud, "y", zero, zero), cloud)
    above = turned(cloud, "y", zero, torch.tensor([math.pi / 2]))
    assert_close(above[0, 0], torch.tensor([0.0, 0.0, 1.0]), 1e-6)
    cells = grid_cells(cloud, 9)
    assert cells[0, 0, 1] == 0
    assert cells[0, 1, 1] == 6
    found = view_angles([[0.0, 360.0], [0.0, 90.0]], [2, 1])
    assert_close(torch.rad2deg(found), torch.tensor([[90.0, 45.0], [270.0, 45.0]]))


def test_default_elevations_are_the_tilts_of_the_authors() -> None:
    # their picture lies on x (downwards) and y; clouds whose z is up are tilted about y by -.4 to -.2 pi from the top
    cloud, config = clouds(1), P2PConfig()
    x, _, z = cloud.unbind(2)
    for elevation, tilt in zip(config.elevation, (0.4 * math.pi, 0.2 * math.pi), strict=True):
        down = math.cos(tilt) * x - math.sin(tilt) * z
        found = turned(cloud, "z", torch.zeros(1), torch.deg2rad(torch.tensor([elevation])))
        assert_close(found[..., 1], -down)
        assert_close(found[..., 0], cloud[..., 1])


# The encoder ----------------------------------------------------------------------------------------------------------


def test_features_are_those_of_the_formula() -> None:
    values, cloud = start_values(), clouds(1, 12)[0]
    values["edge_norm_weight"], values["edge_norm_bias"] = torch.randn(64), torch.randn(64)
    own = cloud @ values["point_weight"].T + values["point_bias"]
    index = neighbours(cloud[None], 4)[0].tolist()
    edges = torch.empty(64, 12, 4)
    for q in range(12):
        for place, k in enumerate(index[q]):
            edges[:, q, place] = values["edge_weight"] @ torch.cat([own[k] - own[q], own[q]])
    for group in range(4):
        part = edges[16 * group : 16 * group + 16]
        edges[16 * group : 16 * group + 16] = (part - part.mean()) / (part.var(unbiased=False) + 1e-5).sqrt()
    edges = edges * values["edge_norm_weight"][:, None, None] + values["edge_norm_bias"][:, None, None]
    largest = torch.where(edges > 0, edges, 0.2 * edges).max(2).values
    expected = values["local_weight"] @ largest + values["local_bias"][:, None]
    assert_close(point_features(values, cloud[None], 4)[0], expected.T)


def test_published_numbers_of_parameters() -> None:
    assert sum(value.numel() for value in start_values().values()) == 83_683
    with torch.device("meta"):
        base = DeiTForImageClassification(DeiTConfig(num_labels=40))
        model = get_peft_model(base, P2PConfig())
    named = [(name, value.numel()) for name, value in model.named_parameters() if "p2p_" in name]
    assert sum(count for name, count in named if "p2p_norm" in name) == 38_400
    assert sum(count for name, count in named if "p2p_class_token" in name) == 768
    assert sum(count for _, count in named) == 83_683 + 38_400 + 768


def test_what_is_trained_by_family_and_choice() -> None:
    swin = adapt("p2p", TINY["swin"]())
    assert not [name for name, _ in swin.named_parameters() if "p2p_class_token" in name]
    assert any("downsample.norm.p2p_norm" in name for name, _ in swin.named_parameters())
    plain = adapt("p2p", TINY["vit"](), train_norms=False, train_class_token=False)
    assert sum(value.numel() for name, value in plain.named_parameters() if "p2p_" in name) == 83_683


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "dinov2", "beit", "convnext", "resnet"])
def test_norms_and_class_token_are_those_of_a_changed_base(family: str) -> None:
    base = TINY[family]()
    model, inputs = move(adapt("p2p", base)), tiny_inputs(base)["pixel_values"]
    expected = copy.deepcopy(base)
    for path, layer in model.get_base_model().named_modules():
        if not isinstance(layer, P2PLayer):
            continue
        if not layer.is_encoder:
            norm = expected.get_submodule(path)
            norm.weight += layer.p2p_norm_weight["default"]
            norm.bias += layer.p2p_norm_bias["default"]
        for name, value in expected.named_parameters() if "default" in layer.p2p_class_token else ():
            if name.endswith("cls_token"):
                value += layer.p2p_class_token["default"]
    # pictures that are drawn already
    found = model.eval()(pixel_values=inputs).logits
    assert_close(found, expected.eval()(pixel_values=inputs).logits, 1e-4)
    assert not torch.allclose(found, base.eval()(pixel_values=inputs).logits, atol=1e-3)


@torch.no_grad()
def test_logits_are_the_mean_over_the_views() -> None:
    base = TINY["vit"]()
    fields = {"azimuth": [0.0, 180.0], "elevation": [18.0, 54.0], "num_azimuths": 3, "num_elevations": 2}
    several = move(adapt("p2p", base, **fields))
    found = several(point_clouds=clouds(), labels=torch.tensor([0, 1]), output_hidden_states=True)
    single = []
    for low in (0.0, 60.0, 120.0):
        for tilt in (18.0, 36.0):
            one = adapt("p2p", base, azimuth=[low, low + 60.0], elevation=[tilt, tilt + 18.0], num_azimuths=1)
            one.load_state_dict(several.state_dict())
            single.append(one(point_clouds=clouds()).logits)
    assert_close(found.logits, torch.stack(single).mean(0))
    assert found.hidden_states[0].shape[0] == 2
    assert found.loss.isfinite()
    as_tuple = several(point_clouds=clouds(), return_dict=False)
    assert_close(as_tuple[0], found.logits)


def test_training_draws_views_and_gathers_statistics_that_are_saved(tmp_path: Any) -> None:
    base = TINY["vit"]()
    model = adapt("p2p", base).train()
    first = model(point_clouds=clouds()).logits
    assert not torch.equal(first, model(point_clouds=clouds()).logits)
    assert encoder_of(model).p2p_running_mean["default"].abs().sum() > 0
    model.eval()
    with torch.no_grad():
        expected = model(point_clouds=clouds()).logits
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True).eval()
        assert torch.equal(loaded(point_clouds=clouds()).logits, expected)
        assert torch.equal(model(point_clouds=clouds()).logits, expected)


def test_calls_that_do_not_go_together_are_refused() -> None:
    base = TINY["vit"]()
    model, images = adapt("p2p", base), tiny_inputs(base)
    with pytest.raises(ConfigError, match="leave one of them out"):
        model(point_clouds=clouds(), **images)
    with pytest.raises(ConfigError, match=r"shape \[2, 24\].*array of shape \(any, 3\)"):
        model(point_clouds=clouds()[..., 0])
    with pytest.raises(ConfigError, match="trained on point_clouds"):
        model.train()(**images)
    with model.disable_adapter(), pytest.raises(ConfigError, match="give the base pixel_values"):
        model(point_clouds=clouds())
    # heads would refuse two before the method does
    model = adapt("p2p", base, modules_to_save=[])
    model.add_adapter("second", P2PConfig(modules_to_save=[]))
    with pytest.raises(ConfigError, match="one adapter at a time"):
        model.base_model.set_adapter(["default", "second"])
    with model.disable_adapter():
        assert torch.equal(output(model, images), output(base, images))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_neighbors": 0}, "num_neighbors=0 must be from 1"),
        ({"object_size": 3}, "object_size=3 must be from 4"),
        ({"up_axis": "w"}, 'up_axis="w" must be x, y or z'),
        ({"azimuth": [90.0, 0.0]}, "azimuth=.* two angles"),
        ({"image_mean": [0.5]}, "image_mean=.* three numbers"),
        ({"image_std": [0.0, 1.0, 1.0]}, "image_std=.* of std positive"),
        ({"object_size": 4000}, "object_size=4000 must be from"),
        ({"exclude_modules": ["layernorm"]}, "takes no exclude_modules"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        P2PConfig(**fields)


def test_models_without_square_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="is made for images"):
        adapt("p2p", TINY["bert"]())
    with pytest.raises(ConfigError, match="object_size=2000 must be from 4 to the side of the picture"):
        adapt("p2p", TINY["vit"](), object_size=2000)
