"""Attributes that describe a module and that no forward reads: the extracted model has them right."""

import pytest
import timm
import torch
from timm.models import FeatureInfo
from torch import nn

from timm_autoslim import convert

IMAGE = torch.zeros(1, 3, 8, 8)


class Branch(nn.Module):
    """A convolution that tells its numbers of channels in the spellings that libraries use."""

    def __init__(self, fan_in, fan_out):
        super().__init__()
        self.conv = nn.Conv2d(fan_in, fan_out, 1)
        self.in_chs, self.in_dim, self.input_size = fan_in, fan_in, fan_in
        self.out_chs, self.out_dim, self.num_channels = fan_out, fan_out, fan_out
        self.out_features = fan_out + 1  # of something else
        self.num_features, self.depth = fan_out, fan_out  # `depth` describes no channels

    def forward(self, x):
        return self.conv(x).relu()


class Described(nn.Module):
    """Two branches and a head, with what timm promises of a model."""

    def __init__(self, **promises):
        super().__init__()
        self.one, self.two, self.head = Branch(3, 6), Branch(6, 10), nn.Linear(10, 4)
        self.num_features = self.head_hidden_size = 10
        self.feature_info = [{"num_chs": 6, "module": "one"}, {"num_chs": 10, "module": "two"}]
        vars(self).update(promises)

    def forward_features(self, x):
        return self.two(self.one(x))

    def forward_head(self, x, pre_logits=False):
        x = x.mean((2, 3))
        return x if pre_logits else self.head(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def slim(model, **widths):
    supernet = convert(model, IMAGE)
    return supernet.extract(supernet.space.from_dict({"one.conv": 4, "two.conv": 7} | widths))


def test_modules_tell_the_lengths_of_what_enters_and_leaves_them():
    model = slim(Described())
    one, two = model.one, model.two
    assert (one.in_chs, one.in_dim, one.input_size) == (3, 3, 3)
    assert (two.in_chs, two.in_dim, two.input_size) == (4, 4, 4)
    assert (two.out_chs, two.out_dim, two.num_channels, two.num_features) == (7, 7, 7, 7)
    assert (one.out_features, one.depth) == (7, 6)


def test_the_model_tells_the_lengths_of_its_features():
    model = slim(Described())
    assert (model.num_features, model.head_hidden_size) == (7, 7)
    assert [info["num_chs"] for info in model.feature_info] == [4, 7]
    assert model.forward_features(IMAGE).shape[1] == 7


@pytest.mark.parametrize("dims", [[6, 10], (6, 10)])
def test_a_width_for_each_stage_follows_the_stages(dims):
    model = slim(Described(embed_dim=dims))
    assert list(model.embed_dim) == [4, 7]


def test_a_width_by_another_name_follows_the_features():
    assert slim(Described(embed_dim=10)).embed_dim == 7


def test_what_enters_a_module_counts_where_the_features_are_taken_before_it():
    info = [{"num_chs": 6, "module": "two", "hook_type": "forward_pre"}, {"num_chs": 10, "module": "two"}]
    assert [item["num_chs"] for item in slim(Described(feature_info=info)).feature_info] == [4, 7]


def test_features_whose_modules_there_are_not_are_taken_from_the_intermediates():
    class Tapped(Described):
        def forward_intermediates(self, x, intermediates_only=False):
            one = self.one(x)
            return [one, self.two(one)]

    info = [{"num_chs": 6, "module": "stages.0"}, {"num_chs": 10, "module": "stages.1"}]
    assert [item["num_chs"] for item in slim(Tapped(feature_info=info)).feature_info] == [4, 7]
    # without intermediates nobody can say, and the numbers stay
    assert [item["num_chs"] for item in slim(Described(feature_info=info)).feature_info] == [6, 10]


def test_what_timm_keeps_in_a_feature_info_object_follows_too():
    class Backbone(Described):
        def __init__(self):
            super().__init__()
            items = [{"num_chs": 6, "module": "one", "reduction": 1}, {"num_chs": 10, "module": "two", "reduction": 1}]
            self.feature_info = FeatureInfo(items, out_indices=(0, 1))

        def forward(self, x):
            x = self.one(x)
            return [x, self.two(x)]

    supernet = convert(Backbone(), IMAGE, keep_output=False)
    model = supernet.extract(supernet.space.from_dict({"one.conv": 4, "two.conv": 7}))
    assert model.feature_info.channels() == [4, 7]
    assert [out.shape[1] for out in model(IMAGE)] == [4, 7]


def test_an_encoder_without_a_head_tells_the_length_of_its_output():
    class Encoder(Described):
        def forward_head(self, x, pre_logits=False):
            raise NotImplementedError

        def forward(self, x):
            return self.forward_features(x).mean((2, 3))

    supernet = convert(Encoder(out_features=10), IMAGE, keep_output=False)
    model = supernet.extract(supernet.space.from_dict({"one.conv": 4, "two.conv": 7}))
    assert (model.num_features, model.head_hidden_size, model.out_features) == (7, 7, 7)


def test_heads_of_attention_tell_their_channels():
    supernet = convert(timm.create_model("test_vit", depth=1, num_classes=10).eval())
    attention = supernet.extract(supernet.space.uniform(0.5, exact=True)).blocks[0].attn
    assert attention.head_dim == supernet.model.blocks[0].attn.head_dim // 2


def test_a_model_that_promises_nothing_is_converted():
    supernet = convert(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1)), IMAGE)
    assert supernet.extract(supernet.space.from_dict({"0": 2}))[2].in_channels == 2
