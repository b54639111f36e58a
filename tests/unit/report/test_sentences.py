"""What the numbers say."""

from dataclasses import replace

from overhaul.report.facts import FORGETTING, TASK_GAIN, TASK_LOSS, Facts
from overhaul.report.sentences import comparison_sentence, limits, measured_sentence, step_sentence, verdict
from overhaul.table import Row

from .examples import full_report, perplexity, three_facts


def test_pruned_and_won_back() -> None:
    assert verdict(three_facts()) == (
        "Half of the block weights are zero and 85% of the lost log-perplexity is back, "
        "with 1.8% of the parameters trained in 2 min 10 s."
    )


def test_better_than_the_reference_is_all_of_it() -> None:
    dense, pruned, won_back = three_facts()

    sentence = verdict((dense, pruned, replace(won_back, perplexity=perplexity("m", 27.0))))

    assert "all of the lost log-perplexity is back" in sentence


def test_pruned_only() -> None:
    dense, pruned, _ = three_facts()

    assert verdict((dense, replace(pruned, nonzero_share_blocks=0.3))) == (
        "70.0% of the block weights are zero and perplexity went from 28.05 (dense) to 1197 (pruned), "
        "42.7 times as much."
    )


def test_one_model_is_described() -> None:
    assert verdict(three_facts()[:1]) == (
        "Dense has 134.5 M parameters, 269 MB on disk, perplexity 28.05 [26.93, 29.17] on austen."
    )


def test_without_perplexity_nothing_is_claimed() -> None:
    dense, *_ = three_facts()
    bare = replace(dense, perplexity=None)

    assert verdict((bare, bare)) == "2 models are shown side by side, without perplexity on both ends."


def test_of_texts_to_forget_and_to_retain_the_losses_are_told() -> None:
    dense, *_ = three_facts()
    names = ("loss on a.jsonl (to forget)", "loss on b.jsonl (to retain)")

    def with_losses(*values: float) -> Facts:
        found = zip(names, values, strict=False)
        rows = (Row(model="m", metric=name, value=v, low=v, high=v, count=9) for name, v in found)
        return replace(dense, metrics=tuple(rows))

    assert verdict((dense, with_losses(0.11, 0.12), with_losses(2.5, 0.13))) == (
        "The loss on a.jsonl (to forget) went from 0.1100 to 2.500 and the loss on b.jsonl (to retain) went from "
        "0.1200 to 0.1300 nats a token."
    )
    assert "went from 0.1100 to 2.500 nats a token" in verdict((with_losses(0.11), with_losses(2.5)))
    assert "to forget" not in verdict((dense, with_losses(2.5)))


def test_limits_name_what_got_worse_and_what_zeros_do_not_buy() -> None:
    worse, stored = limits(three_facts())

    assert worse == "perplexity: 49.10 [47.14, 51.06] in won back, 28.05 [26.93, 29.17] in dense."
    assert stored.startswith("Zeros are stored like other numbers")


def test_an_unchanged_model_has_no_limits() -> None:
    dense, *_ = three_facts()

    assert limits((dense,)) == ()
    assert limits((dense, replace(dense, label="copy"))) == ()


def test_a_step_names_the_settings_that_were_chosen() -> None:
    prune, perp = full_report().lineage

    assert step_sentence(prune) == "prune wanda with samples 32, on 16,384 tokens of austen, in 21 s."
    assert step_sentence(replace(perp, non_default=(), data=None, seconds=None)) == "adapt perp."


def test_a_comparison_names_the_best_at_half_the_bytes() -> None:
    dense, pruned, won_back = three_facts()
    large, small = (replace(won_back, label=name, bytes=size) for name, size in (("large", 130_000_000), ("small", 9)))
    worse = replace(small, perplexity=perplexity("m", 60.0))

    assert comparison_sentence((dense, pruned, worse, large)) == (
        "At most half the bytes of dense: large is best, perplexity 49.10 against 28.05, with 48% of the bytes."
    )


def test_a_comparison_without_a_half_names_the_smallest() -> None:
    dense, pruned, won_back = three_facts()

    assert comparison_sentence((dense, pruned, replace(won_back, bytes=200_000_000))) == (
        "No model has half the bytes of dense: won back is smallest, "
        "perplexity 49.10 against 28.05, with 74% of the bytes."
    )
    assert "without quality or size" in comparison_sentence((replace(dense, perplexity=None), pruned))


def test_a_measure_says_its_range() -> None:
    def row(model: str, value: float) -> Row:
        return Row(model=model, metric="accuracy/boolq", value=value, low=value, high=value, count=9)

    assert measured_sentence([row("a", 0.5)]) == "Accuracy/boolq of a: 0.5000."
    assert measured_sentence([row("a", 0.5), row("b", 0.25)]) == "Accuracy/boolq: from 0.2500 (b) to 0.5000 (a)."
    assert measured_sentence([row("a", 0.5), row("b", 0.5)]) == "Accuracy/boolq of every model: 0.5000."


def test_adaptations_are_told_by_what_they_won_and_lost() -> None:
    def adapted(label: str, gain: float, lost: float) -> Facts:
        metrics = tuple(
            Row(model=label, metric=name, value=value, low=value, high=value, count=1)
            for name, value in ((TASK_LOSS, 3 - gain), (TASK_GAIN, gain), (FORGETTING, lost))
        )
        return Facts(label=label, path=label, parameters=9, metrics=metrics)

    dense, strong, careful = adapted("dense", 0, 0), adapted("strong", 2.0, 0.5), adapted("careful", 1.5, 0.125)

    assert comparison_sentence([dense, strong, careful]) == (
        "strong gains most on the task, 2.000 nats a token, and forgets 0.5000; careful forgets least, 0.1250, and "
        "gains 1.500."
    )
    assert comparison_sentence([dense, careful]).endswith("1.500 nats a token, and forgets least, 0.1250.")
    assert (
        comparison_sentence([dense, adapted("bad", -1.0, 0.5)]) == "No model has a lower loss on the task than dense."
    )
