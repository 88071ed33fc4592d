//! What the numbers say, in plain words. Every sentence is computed.

use super::Evidence;
use super::evidence::{Diff, Diverged};
use super::layer_findings::furthest_first;
use super::markdown::{code, listed};
use super::measure::Measure;
use super::model::Model;
use super::numbers::{
    mib, percent_change_within, significant, thousands, times, times_with_interval, with_block_interval, with_interval,
};
use super::paired::AgainstBaseline;
use super::speeds::{NoVerdict, Spreads};
use std::collections::BTreeSet;

/// Most comparisons told one by one; above it only the extremes are.
const N_TOLD: usize = 3;

/// Returns the summary of a report: one paragraph of Markdown.
pub fn paragraph(evidence: &Evidence<'_>) -> String {
    let mut sentences = vec![opening(evidence)];
    sentences.extend(lossy_sources(evidence));
    let pairs: Vec<(&Model, &Model)> =
        evidence.models.iter().filter_map(|model| Some((model, evidence.baseline_of(model)?))).collect();
    let told: Vec<String> = pairs.iter().filter_map(|(model, baseline)| against(evidence, model, baseline)).collect();
    if told.len() <= N_TOLD {
        sentences.extend(told);
    } else {
        sentences.extend(extremes(evidence, &pairs));
    }
    if evidence.diffs.len() <= N_TOLD {
        sentences.extend(evidence.diffs.iter().filter_map(damage));
    } else {
        sentences.push(format!("The outputs of {} models were compared layer by layer.", evidence.diffs.len()));
    }
    let n_missing = evidence.request.missing.len();
    match n_missing {
        0 => {}
        1 => sentences.push("One input did not succeed and is missing (see [Inputs](#inputs)).".to_owned()),
        n => sentences.push(format!("{n} inputs did not succeed and are missing (see [Inputs](#inputs)).")),
    }
    sentences.join(" ")
}

fn opening(evidence: &Evidence<'_>) -> String {
    let name = |model: &Model| format!("{} ({})", code(&model.address), model.scheme);
    match evidence.models.as_slice() {
        [] => "No model was measured.".to_owned(),
        [one] => format!("One model was looked at: {}.", name(one)),
        few if few.len() <= 5 => {
            let names: Vec<String> = few.iter().map(name).collect();
            format!("{} models side by side: {}.", names.len(), listed(&names))
        }
        many => format!("{} models side by side.", many.len()),
    }
}

/// Returns a sentence on models that were quantized before labpipe loaded them: what that lost is in every number and in no comparison.
fn lossy_sources(evidence: &Evidence<'_>) -> Option<String> {
    let loaded = evidence.models.iter().filter(|model| !model.is_quantized && model.lossy_source().is_some());
    let names: Vec<String> = loaded.map(|model| code(&model.address)).collect();
    let are = if names.len() == 1 {
        "is no unquantized baseline: its file holds"
    } else {
        "are no unquantized baselines: their files hold"
    };
    (!names.is_empty())
        .then(|| format!("{} {are} quantized weights, and what that lost shows in no comparison here.", listed(&names)))
}

/// Returns how a model differs from its baseline; None where nothing was measured of both.
fn against(evidence: &Evidence<'_>, model: &Model, baseline: &Model) -> Option<String> {
    let mut clauses = Vec::new();
    if let Some((before, now)) = weights(evidence, model, baseline) {
        let ratio = times(now as f64 / before as f64);
        clauses.push(format!("takes {ratio} the weight memory ({} instead of {})", mib(now), mib(before)));
    }
    for (metric, verb) in [("prefill_tokens_per_second", "prefills"), ("decode_tokens_per_second", "decodes")] {
        if let Some((before, now)) = common(evidence, model, baseline, metric) {
            let (ratio, note) = speed_ratio(evidence, before, now);
            clauses.push(format!(
                "{verb} at {ratio} the speed ({}: {} instead of {} tokens/s, {note})",
                now.label,
                significant(now.value),
                significant(before.value),
            ));
        }
    }
    let of_pair = |one: &&AgainstBaseline| one.model == model.address && one.baseline == baseline.address;
    clauses.extend(evidence.against.iter().find(of_pair).map(perplexity_clause));
    clauses.extend(divergence_clause(evidence, model, baseline));
    (!clauses.is_empty()).then(|| {
        format!("Against {}, {} {}.", evidence.named(&baseline.address), code(&model.address), listed(&clauses))
    })
}

/// Returns how many times as fast, with the 95 % interval where there is one, and what it is from.
fn speed_ratio(evidence: &Evidence<'_>, before: &Measure, now: &Measure) -> (String, String) {
    let ratio = times(now.value / before.value);
    let starts = match (before.n, now.n) {
        (1, 1) => "one start each".to_owned(),
        (before, now) if before == now => format!("{now} starts each"),
        (before, now) => format!("{now} and {before} starts"),
    };
    let (Some(first), Some(second)) = (&before.starts, &now.starts) else { return (ratio, starts) };
    match Spreads::of(evidence.measures.iter()).ratio(first, second) {
        Ok(found) => {
            let ratio = times_with_interval(now.value / before.value, found.low, found.high);
            let few = if found.differs.is_none() { ", too few for a verdict" } else { "" };
            (ratio, format!("95 %, {starts}{few}"))
        }
        Err(NoVerdict::OtherDay) => (ratio, format!("{starts}, measured on different days")),
        Err(NoVerdict::OtherDevice) => (ratio, format!("{starts}, on different devices")),
        Err(NoVerdict::NoSpread) => (ratio, format!("{starts}: their noise is not known")),
    }
}

fn perplexity_clause(pair: &AgainstBaseline) -> String {
    let [before, now] = pair.perplexity;
    if !before.is_finite() || !now.is_finite() {
        return format!(
            "has a perplexity of {} instead of {} ({}, n_scored = {}; compare the mean NLL instead)",
            significant(now),
            significant(before),
            pair.label,
            thousands(pair.n_scored)
        );
    }
    format!(
        "has {} perplexity ({}; {} instead of {}, {})",
        perplexity_change(pair),
        pair.basis(),
        significant(now),
        significant(before),
        pair.label
    )
}

/// Returns the change of perplexity in percent, with its interval.
pub fn perplexity_change(pair: &AgainstBaseline) -> String {
    let ends = pair.interval.as_ref().map(|interval| (interval.low.exp(), interval.high.exp()));
    percent_change_within(pair.ratio(), ends)
}

/// Returns how far the model's distributions are from the baseline's, where they were compared with it.
fn divergence_clause(evidence: &Evidence<'_>, model: &Model, baseline: &Model) -> Option<String> {
    let of_pair = |one: &&Diverged| one.row.model == model.address && one.base == baseline.address;
    let found = &evidence.divergences.iter().find(of_pair)?.row.result;
    let agreement = &found.top1_agreement_interval;
    let ends = agreement.as_ref().map(|ends| format!(" [{:.1}, {:.1}]", 100.0 * ends.low, 100.0 * ends.high));
    Some(format!(
        "diverges from it by {} nats a token (mean KL) with the same first choice at {:.1} %{} of {} tokens (95 % intervals)",
        with_block_interval(found.kl_mean, found.kl_mean_interval.as_ref()),
        100.0 * found.top1_agreement,
        ends.unwrap_or_default(),
        thousands(found.n_scored)
    ))
}

fn extremes(evidence: &Evidence<'_>, pairs: &[(&Model, &Model)]) -> Vec<String> {
    let mut sentences = Vec::new();
    let smallest = pairs
        .iter()
        .filter_map(|(model, baseline)| Some((model, baseline, weights(evidence, model, baseline)?)))
        .min_by_key(|(_, _, (_, now))| *now);
    if let Some((model, baseline, (before, now))) = smallest {
        sentences.push(format!(
            "The smallest is {} with {}, {} the weights of {}.",
            code(&model.address),
            mib(now),
            times(now as f64 / before as f64),
            evidence.named(&baseline.address)
        ));
    }
    let pair_of = |metric: &'static str| {
        let measured = pairs.iter().filter_map(move |(model, baseline)| common(evidence, model, baseline, metric));
        let ratios = measured.map(|(before, now)| (now.value / before.value, before, now));
        ratios.filter(|(ratio, _, _)| ratio.is_finite()).collect::<Vec<_>>()
    };
    for (metric, verb) in [("decode_tokens_per_second", "decodes"), ("prefill_tokens_per_second", "prefills")] {
        let fastest = pair_of(metric).into_iter().max_by(|a, b| a.0.total_cmp(&b.0));
        if let Some((_, before, now)) = fastest {
            sentences.push(format!(
                "Of the quantized, {} {verb} fastest: {} tokens/s ({}), {} the speed of {} ({}).",
                code(&now.model),
                with_interval(now.value, now.interval()),
                now.label,
                speed_ratio(evidence, before, now).0,
                code(&before.model),
                speed_ratio(evidence, before, now).1
            ));
        }
    }
    let is_first = |one: &&AgainstBaseline| one.label == evidence.against[0].label && one.ratio().is_finite();
    let mut by_loss: Vec<&AgainstBaseline> = evidence.against.iter().filter(is_first).collect();
    by_loss.sort_by(|a, b| a.ratio().total_cmp(&b.ratio()));
    if let (Some(least), Some(most)) = (by_loss.first(), by_loss.last()) {
        sentences.push(format!(
            "Perplexity changes least with {} ({}) and most with {} ({}), {} ({}).",
            code(&least.model),
            perplexity_change(least),
            code(&most.model),
            perplexity_change(most),
            least.label,
            least.basis()
        ));
    }
    let is_lost = |one: &&Measure| one.metric == "perplexity" && !one.value.is_finite();
    let lost: BTreeSet<String> = evidence.measures.iter().filter(is_lost).map(|one| code(&one.model)).collect();
    if !lost.is_empty() {
        let lost: Vec<String> = lost.into_iter().collect();
        sentences.push(format!("The perplexity of {} is not finite; their mean NLL tells them apart.", listed(&lost)));
    }
    sentences
}

fn weights(evidence: &Evidence<'_>, model: &Model, baseline: &Model) -> Option<(u64, u64)> {
    let before = evidence.weights_bytes(&baseline.address).filter(|bytes| *bytes > 0)?;
    Some((before, evidence.weights_bytes(&model.address)?))
}

/// Returns the first measure of both models with the same label: the baseline's and the model's.
fn common<'e>(
    evidence: &'e Evidence<'_>,
    model: &'e Model,
    baseline: &'e Model,
    metric: &'static str,
) -> Option<(&'e Measure, &'e Measure)> {
    evidence.labels(metric).into_iter().find_map(|label| {
        let now = evidence.measures_of(&model.address, metric, label).next()?;
        let before = evidence.measures_of(&baseline.address, metric, label).next()?;
        (before.value > 0.0).then_some((before, now))
    })
}

fn damage(diff: &Diff<'_>) -> Option<String> {
    let ranked = furthest_first(&diff.rows);
    let worst = ranked.first()?;
    if worst.mse == 0.0 {
        return Some(format!(
            "Layer by layer, the linears of {} put out exactly what those of {} do ({} tokens).",
            code(&diff.candidate),
            code(&diff.reference),
            thousands(worst.n_tokens)
        ));
    }
    let sqnr = worst.sqnr_db.map_or_else(|| "SQNR n/a".to_owned(), |db| format!("SQNR {db:.1} dB"));
    Some(format!(
        "Layer by layer, {} strays furthest from {} in {} ({sqnr}, cosine {:.4}, {} tokens); {} modules were compared.",
        code(&diff.candidate),
        code(&diff.reference),
        code(&worst.module),
        worst.cosine,
        thousands(worst.n_tokens),
        thousands(diff.rows.len())
    ))
}
