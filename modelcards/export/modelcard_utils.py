# mypy: ignore-errors
"""
Model cards against plain torch hooks, on tiny random models. Nothing is taken from a hub.

A place is (stream, module, side, part, heads): at the "input" or "output" of a module, the
i-th of n equal parts of its last axis if part is (i, n), with that many heads side by side
if heads is a number. Places are what the cards say; how pyvene reads and edits them is
compared with hooks that share no code with it.
"""

import pyvene as pv
import torch
from pyvene.models.constants import CONST_INPUT_HOOK, split_half, split_head_and_permute, split_three
from pyvene.models.modeling_utils import get_dimension_by_component

# What was compared: class, stream, unit, operation, largest difference.
CHECKS = []

# The residual stream between attention and MLP is the input of a norm and goes past it: an
# edit has to be in place to reach both.
EDITED_IN_PLACE = {"resid_mid"}

PARTS = {split_half: 2, split_three: 3}

POSITIONS = [[1, 4], [0, 3], [2, 5]]
SOURCE_POSITIONS = [[2, 0], [5, 1], [4, 3]]


def random_model(model_class, config):
    """A model with weights, biases and scales of norms all away from what they start with."""
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            start = parameter if parameter.dim() == 1 and name.endswith("weight") else 0
            parameter.copy_(start + 0.25 * torch.randn_like(parameter))
    return model.eval()


def first_tensor(output):
    """Logits or last hidden states, or the first of a module's outputs."""
    return output if isinstance(output, torch.Tensor) else first_tensor(output[0])


def look_at(model, module, side, look):
    """Hook a module; `look` sees the tensor and may return another."""
    module = model.get_submodule(module.replace("[", ".").replace("]", ""))

    def pre_hook(_, args, kwargs):
        if args:
            new = look(args[0])
            return ((args[0] if new is None else new), *args[1:]), kwargs
        name = next(iter(kwargs))
        new = look(kwargs[name])
        return args, {**kwargs, name: kwargs[name] if new is None else new}

    def hook(_, args, output):
        new = look(first_tensor(output))
        if new is None or isinstance(output, torch.Tensor):
            return new
        return (new, *output[1:])

    if side == "input":
        return module.register_forward_pre_hook(pre_hook, with_kwargs=True)
    return module.register_forward_hook(hook)


def view_of(tensor, part, heads):
    """The part as (batch, position, width) or (batch, head, position, width); a view."""
    if part is not None:
        tensor = tensor.chunk(part[1], dim=-1)[part[0]]
    if heads is not None:
        tensor = tensor.unflatten(-1, (heads, -1)).transpose(1, 2)
    return tensor


class ModelCardTests:
    """
    Tests of a card; a test case has, beside them,

    config: a tiny config of the family.
    model_classes: the classes with a card.
    published: if config has other heads, one with those of the family's default config, where all widths hold.
    no_width: streams whose width pyvene cannot spell, so that they have none.
    unchecked: streams that are not compared.
    """

    published = None
    no_width = ()
    unchecked = ()

    @classmethod
    def setUpClass(self):
        torch.manual_seed(1)
        self.models = {model_class: random_model(model_class, self.config) for model_class in self.model_classes}
        self.cards = {model_class: self._places(model_class, self.config) for model_class in self.model_classes}
        self.base = {"input_ids": torch.randint(3, self.config.vocab_size, (3, 6))}
        self.source = {"input_ids": torch.randint(3, self.config.vocab_size, (3, 6))}

    @classmethod
    def _places(self, model_class, config):
        """The places of a class, from its card."""
        n_head = config.num_attention_heads
        heads = {"n_head": n_head, "n_kv_head": getattr(config, "num_key_value_heads", None) or n_head}
        places = []
        for stream, (module, hook, *splits) in pv.type_to_module_mapping[model_class].items():
            part = next(((index, PARTS[split]) for split, index in splits if split in PARTS), None)
            number = next((heads[name] for split, name in splits if split is split_head_and_permute), None)
            if stream not in self.unchecked:
                places.append((stream, module, "input" if hook == CONST_INPUT_HOOK else "output", part, number))
        return places

    def _layers(self, module):
        return range(self.config.num_hidden_layers) if "%s" in module else [0]

    def _read(self, model, places, inputs):
        """What every place holds in every layer: (stream, layer) -> tensor."""
        seen, handles = {}, []
        for stream, module, side, part, heads in places:
            for layer in self._layers(module):

                def look(tensor, key=(stream, layer), part=part, heads=heads):
                    seen[key] = view_of(tensor, part, heads).clone()

                path = module.replace("%s", str(layer))
                handles.append(look_at(model, path, side, look))
        with torch.no_grad():
            model(**inputs)
        for handle in handles:
            handle.remove()
        return seen

    def _edited(self, model, place, layer, edit):
        """The model's output with a place edited in layer."""
        stream, module, side, part, heads = place

        def look(tensor):
            edited = tensor if stream in EDITED_IN_PLACE else tensor.clone()
            edit(view_of(edited, part, heads))
            return edited

        handle = look_at(model, module.replace("%s", str(layer)), side, look)
        with torch.no_grad():
            output = first_tensor(model(**self.base))
        handle.remove()
        return output

    def _units(self, heads):
        """Units of a place, with locations in base and in source."""
        if heads is None:
            return {"pos": (POSITIONS, SOURCE_POSITIONS)}
        some = [[0, 1], [1, 0], [1, heads - 1]] if heads > 2 else [list(range(heads))] * 3
        others = [row[::-1] for row in some]
        return {
            "h": (some, others),
            "h.pos": ([some, POSITIONS], [others, SOURCE_POSITIONS]),
        }

    def _at(self, tensor, unit, locations):
        """A tensor's values at locations, and how to write there."""
        row = torch.arange(3)[:, None]
        if unit == "h.pos":
            heads, positions = (torch.tensor(level) for level in locations)
            index = (row[:, :, None], heads[:, :, None], positions[:, None, :])
        else:
            index = (row, torch.tensor(locations))
        return tensor[index], index

    def _check(self, model_class, stream, unit, operation, ours, golden):
        self.assertEqual(ours.shape, golden.shape, f"{stream} of {model_class.__name__}")
        difference = (ours - golden).abs().max().item()
        CHECKS.append([model_class.__name__, stream, unit, operation, difference])
        message = f"{operation} {unit} of {stream}, {model_class.__name__}: off by {difference:.2g}"
        self.assertTrue(torch.allclose(ours, golden, atol=1e-5, rtol=1e-5), message)

    def test_collect_positive(self):
        """
        All streams of all layers in one run.
        """
        for model_class, places in self.cards.items():
            model = self.models[model_class]
            golden = self._read(model, places, self.base)
            wanted = [
                (stream, layer, unit, locations[0])
                for stream, module, _, _, heads in places
                for layer in self._layers(module)
                for unit, locations in self._units(heads).items()
            ]
            intervenable = pv.IntervenableModel(
                pv.IntervenableConfig(
                    representations=[
                        pv.RepresentationConfig(layer, stream, unit, 2) for stream, layer, unit, _ in wanted
                    ],
                    intervention_types=pv.CollectIntervention,
                ),
                model,
            )
            with torch.no_grad():
                (_, collected), _ = intervenable(
                    self.base, unit_locations={"base": [locations for *_, locations in wanted]}
                )
            self.assertEqual(len(collected), len(wanted))
            for ours, (stream, layer, unit, locations) in zip(collected, wanted):
                values, _ = self._at(golden[stream, layer], unit, locations)
                self._check(model_class, stream, unit, "collect", ours, values)

    def test_zero_and_vanilla_positive(self):
        """
        Each stream of the last layer, at other places in every example.
        """
        for model_class, places in self.cards.items():
            model = self.models[model_class]
            source = self._read(model, places, self.source)
            for place in places:
                layer = self._layers(place[1])[-1]
                for unit, (locations, source_locations) in self._units(place[4]).items():
                    values, _ = self._at(source[place[0], layer], unit, source_locations)
                    for operation, new in (("zero", torch.zeros_like(values)), ("vanilla", values)):

                        def edit(view, new=new, unit=unit, locations=locations):
                            view[self._at(view, unit, locations)[1]] = new

                        golden = self._edited(model, place, layer, edit)
                        kind = pv.ZeroIntervention if operation == "zero" else pv.VanillaIntervention
                        intervenable = pv.IntervenableModel(
                            pv.IntervenableConfig(
                                representations=[pv.RepresentationConfig(layer, place[0], unit, 2)],
                                intervention_types=kind,
                            ),
                            model,
                        )
                        with torch.no_grad():
                            _, outputs = intervenable(
                                self.base,
                                [self.source] if operation == "vanilla" else None,
                                {"sources->base": ([source_locations], [locations])},
                            )
                        ours = first_tensor(outputs)
                        self._check(model_class, place[0], unit, operation, ours, golden)

    def test_residual_stream_positive(self):
        """
        A block hands the next one what came in and what attention and MLP add.
        """
        for model_class, places in self.cards.items():
            seen = self._read(self.models[model_class], places, self.base)
            streams = {place[0] for place in places}
            for layer in range(self.config.num_hidden_layers):
                stream, sums = seen["block_input", layer], []
                if {"attention_contribution", "mlp_contribution"} <= streams:
                    stream = stream + seen["attention_contribution", layer]
                    if "resid_mid" in streams:
                        sums.append(("resid_mid", stream, seen["resid_mid", layer]))
                    stream = stream + seen["mlp_contribution", layer]
                    sums.append(("block_output", stream, seen["block_output", layer]))
                if ("block_input", layer + 1) in seen:
                    following = seen["block_input", layer + 1]
                    sums.append(("block_input", following, seen["block_output", layer]))
                for name, ours, golden in sums:
                    self._check(model_class, name, "pos", "sum", ours, golden)

    def test_widths_positive(self):
        """
        The width of the whole vector; none where pyvene cannot spell it.
        """
        config = self.published or self.config
        for model_class in self.model_classes:
            model = random_model(model_class, config)
            seen = self._read(model, self._places(model_class, config), self.base)
            for (stream, _), tensor in seen.items():
                width = get_dimension_by_component(model_class, config, stream)
                golden = None if stream in self.no_width or stream == "logits" else tensor.shape[-1]
                self.assertEqual(width, golden, f"{stream} of {model_class.__name__}")

    def test_trainable_positive(self):
        """
        A rotation of any stream that has a width; interchanged with itself, it changes nothing.
        """
        config = self.published or self.config
        for model_class in self.model_classes:
            model = random_model(model_class, config)
            with torch.no_grad():
                golden = first_tensor(model(**self.base))
            for stream, module, _, _, heads in self._places(model_class, config):
                if get_dimension_by_component(model_class, config, stream) is None:
                    continue
                locations = [[0]] * 3 if heads else [[1], [4], [2]]
                intervenable = pv.IntervenableModel(
                    pv.IntervenableConfig(
                        representations=[
                            pv.RepresentationConfig(self._layers(module)[-1], stream, "h" if heads else "pos", 1)
                        ],
                        intervention_types=pv.RotatedSpaceIntervention,
                    ),
                    model,
                )
                with torch.no_grad():
                    _, outputs = intervenable(self.base, [self.base], {"sources->base": ([locations], [locations])})
                ours = first_tensor(outputs)
                difference = (ours - golden).abs().max().item()
                message = f"a rotation of {stream}, {model_class.__name__}: off by {difference:.2g}"
                self.assertTrue(torch.allclose(ours, golden, atol=1e-4, rtol=1e-4), message)
