"""The model card: README.md of an output directory, with the front matter that model hubs read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from overhaul.kinds import Kind
from overhaul.report.facts import Report
from overhaul.report.sentences import limits, step_sentence, verdict
from overhaul.report.tables import markdown_table

_TASKS = {Kind.IMAGE_CLASSIFIER.value: "image-classification", Kind.TEXT_CLASSIFIER.value: "text-classification"}
Relation = Literal["finetune", "adapter", "merge", "quantized"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CardData:
    """A corpus as a card names it; `hub_name` is its name on the hub, if it has one."""

    name: str
    license: str
    hub_name: str = ""


def model_card(
    report: Report,
    *,
    name: str,
    license: str,
    base_model: str | Sequence[str],
    relation: Relation,
    datasets: Sequence[CardData] = (),
    citations: Sequence[str] = (),
    use_snippet: str = "",
) -> str:
    """The card as text; the last of `report.facts` is the model it describes, the first is its base.

    Args:
        report: what was done and measured.
        name: what the model is called, and what the snippet loads.
        license: of the weights: an SPDX-like identifier of the hub, such as `apache-2.0`.
        base_model: the model or models it was made from.
        relation: how it was made from them.
        datasets: the corpora that the steps read.
        citations: BibTeX entries or references of the methods' papers.
        use_snippet: Python that uses the model; by default, plain transformers generating a sentence.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # Markdown, not HTML: escaping here would show up in code blocks.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("card.md.j2").render(
        front_matter=front_matter(
            report, name=name, license=license, base_model=base_model, relation=relation, datasets=datasets
        ),
        name=name,
        verdict=verdict(report.facts),
        sentences=[step_sentence(step) for step in report.lineage],
        table=markdown_table(report.facts),
        snippet=(use_snippet or snippet_of(report.facts[-1].kind, name)).strip(),
        limits=limits(report.facts),
        datasets=datasets,
        report=report,
        citations=[citation.strip() for citation in citations],
    )


def front_matter(
    report: Report,
    *,
    name: str,
    license: str,
    base_model: str | Sequence[str],
    relation: Relation,
    datasets: Sequence[CardData] = (),
) -> str:
    """The YAML between the `---` lines, in the vocabulary of model hubs."""
    import yaml

    methods = dict.fromkeys(step.method for step in report.lineage)
    fields: dict[str, Any] = {
        "base_model": base_model if isinstance(base_model, str) else list(base_model),
        "base_model_relation": relation,
        "library_name": "transformers",
        "license": license,
        "pipeline_tag": _task(report),
        "tags": ["overhaul", *methods],
    }
    hub_names = [data.hub_name for data in datasets if data.hub_name]
    if hub_names:
        fields["datasets"] = hub_names
    if results := _results(report):
        fields["model-index"] = [{"name": name, "results": results}]
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=110)


def _results(report: Report) -> list[dict[str, Any]]:
    model = report.facts[-1]
    rows = [*((model.perplexity,) if model.perplexity else ()), *model.metrics]
    results = []
    for row in rows:
        # `accuracy/boolq` names its corpus itself; perplexity was measured on the corpus of the facts.
        metric, _, corpus = row.metric.partition("/")
        corpus = corpus or model.corpus or "held-out text"
        results.append(
            {
                "task": {"type": _task(report)},
                "dataset": {"name": corpus, "type": corpus},
                "metrics": [{"type": metric, "value": float(f"{row.value:.6g}")}],
            }
        )
    return results


def _task(report: Report) -> str:
    """What the hub calls what the model does."""
    return _TASKS.get(report.facts[-1].kind, "text-generation")


def snippet_of(kind: str, name: str, *, own_code: bool = False) -> str:
    """Python that uses a model of this kind with plain transformers.

    Args:
        kind: the value of a `Kind`; any other stands for a language model.
        name: a directory or a name on the hub.
        own_code: whether its architecture's code lies beside its weights.
    """
    of_kind = {Kind.IMAGE_CLASSIFIER.value: image_snippet, Kind.TEXT_CLASSIFIER.value: text_class_snippet}
    return of_kind.get(kind, transformers_snippet)(name, ", trust_remote_code=True" if own_code else "")


def image_snippet(name: str, more: str = "") -> str:
    """Python that loads the image classifier `name` with plain transformers and names what a picture shows.

    Args:
        name: a directory or a name on the hub.
        more: further arguments, with a comma before each.
    """
    return f"""
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained({name!r}{more})
processor = AutoImageProcessor.from_pretrained({name!r})
logits = model(**processor(Image.open("picture.png"), return_tensors="pt")).logits
print(model.config.id2label[int(logits.argmax())])
"""


def text_class_snippet(name: str, more: str = "") -> str:
    """Python that loads the text classifier `name` with plain transformers and names the classes of two texts."""
    return f"""
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained({name!r}{more})
tokenizer = AutoTokenizer.from_pretrained({name!r})
inputs = tokenizer(["One text.", "Another text, which is longer."], padding=True, return_tensors="pt")
print([model.config.id2label[int(place)] for place in model(**inputs).logits.argmax(dim=-1)])
"""


def transformers_snippet(name: str, more: str = "") -> str:
    """Python that loads the model `name` with plain transformers and writes a sentence with it."""
    return f"""
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name!r}, dtype="auto"{more})
tokenizer = AutoTokenizer.from_pretrained({name!r})
inputs = tokenizer("It is a truth universally acknowledged", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
"""


def banked_snippet(name: str, task: str) -> str:
    """Python that makes the frozen model `name` that of one of its tasks."""
    return f"""
from overhaul.learn_export import opened

banked = opened({name!r})
banked.use(banked.find({task!r}))
model = banked.model  # plain transformers loads the frozen model, which knows no task
"""


def overhaul_snippet(name: str, *, with_library: bool = False) -> str:
    """Python that loads the model `name` with this project, for what transformers does not know."""
    more = ", with_library=True" if with_library else ""
    return f"""
from overhaul import artifact
from overhaul.evaluate import generate

loaded = artifact.load({name!r}{more})
print(generate(loaded.model, loaded.processor, "It is a truth universally acknowledged", tokens=40))
"""


def served_classes_snippet(name: str) -> str:
    """Python that names the classes of two texts with the text classifier `name` and the adapters of its shards."""
    return f"""
from overhaul import artifact
from overhaul.kinds import Kind

loaded = artifact.load({name!r}, kinds=[Kind.TEXT_CLASSIFIER], with_library=True)
inputs = loaded.processor(["One text.", "Another text, which is longer."], padding=True, return_tensors="pt")
logits = loaded.model(**inputs).logits  # plain transformers loads the frozen model, which knows nothing
print([loaded.model.config.id2label[int(place)] for place in logits.argmax(dim=-1)])
"""


def served_images_snippet(name: str) -> str:
    """Python that names the class of an image with the image classifier `name` and the adapters of its shards."""
    return f"""
from PIL import Image

from overhaul import artifact
from overhaul.kinds import Kind

loaded = artifact.load({name!r}, kinds=[Kind.IMAGE_CLASSIFIER], with_library=True)
inputs = loaded.processor(Image.open("picture.png"), return_tensors="pt")
logits = loaded.model(**inputs).logits  # plain transformers loads the frozen model, which knows nothing
print(loaded.model.config.id2label[int(logits.argmax(dim=-1))])
"""
