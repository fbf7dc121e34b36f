//! Figures: what is drawn of what was measured, each with its numbers in a table beneath.

use super::plots::{self, CONTROL, Dots, HARMFUL, HARMLESS, Histogram, INK, LOOK_ALIKE, Line, MUTED, NATIVE};
use super::survey::MEASURES;
use super::tables::{number, percent, table, text};
use crate::eval::backdoor::{Backdoor, Conduct, LayerSweep, SweptConduct, swept_layer};
use crate::eval::controls::Role;
use crate::eval::detection::{Detection, GateScores};
use crate::eval::metrics::Proportion;
use crate::eval::refusal::{Behaviour, Steering, StrengthRow};
use crate::eval::{EvalError, RefusalSweep, RefusalsAt, Utility};
use crate::learn::Survey;
use maud::{Markup, PreEscaped, html};
use plotters::style::RGBColor;

/// A drawing with a title, what its colours mean, and its numbers.
fn figure(title: &str, svg: String, legend: &[(&str, RGBColor)], numbers: Markup) -> Markup {
    html! {
        figure {
            figcaption { (title) }
            @if !legend.is_empty() {
                p.legend {
                    @for (name, RGBColor(r, g, b)) in legend {
                        span { i data-colour=(format!("{r:02x}{g:02x}{b:02x}")) {} (name) }
                    }
                }
            }
            (PreEscaped(svg))
            details { summary { "Numbers" } (numbers) }
        }
    }
}

/// Scores of both or all three classes.
pub fn histogram(scores: &GateScores) -> Result<Markup, EvalError> {
    let mut classes = vec![("positive", HARMFUL, &scores.positive), ("negative", HARMLESS, &scores.negative)];
    if !scores.look_alike.is_empty() {
        classes.push(("look-alike", LOOK_ALIKE, &scores.look_alike));
    }
    let histogram = Histogram::new(&classes.iter().map(|class| class.2.as_slice()).collect::<Vec<_>>());
    let colours: Vec<RGBColor> = classes.iter().map(|class| class.1).collect();
    let title = format!("Scores of gate {}", scores.gate);
    let svg = histogram.draw(&title, &colours, scores.threshold)?;
    let header: Vec<&str> = ["from", "to"].into_iter().chain(classes.iter().map(|class| class.0)).collect();
    let filled = (0..histogram.counts[0].len()).filter(|bin| histogram.counts.iter().any(|counts| counts[*bin] > 0));
    let rows = filled.map(|bin| {
        let edges = [bin, bin + 1].map(|bin| text(number(histogram.edge(bin), 2)));
        let counts = histogram.counts.iter().map(|counts| text(counts[bin].to_string()));
        (None, edges.into_iter().chain(counts).collect())
    });
    let mut legend: Vec<_> = classes.iter().map(|class| (class.0, class.1)).collect();
    if scores.threshold.is_some() {
        legend.push(("threshold", INK));
    }
    let threshold = scores.threshold.map(|at| format!("Threshold: {at:.3}. ")).unwrap_or_default();
    Ok(figure(&title, svg, &legend, html! { p { (threshold) "Prompts in each bin:" } (table(&header, rows)) }))
}

pub fn roc(detection: &Detection) -> Result<Markup, EvalError> {
    let shown = detection.rows.iter().filter(|row| !row.roc.is_empty());
    let colour = |role| match role {
        Role::Guard => HARMFUL,
        Role::Native => NATIVE,
        _ => CONTROL,
    };
    let mut lines: Vec<Line> =
        shown.clone().map(|row| Line::new(colour(row.role), row.roc.iter().map(|[x, y]| (*x, *y)).collect())).collect();
    // The guard's own on top.
    lines.reverse();
    lines.insert(0, Line { dashed: true, ..Line::new(MUTED, vec![(0.0, 0.0), (1.0, 1.0)]) });
    let title = "ROC: positive against negative prompts";
    let range = || Some(-0.01..1.01);
    let svg = plots::lines(title, ("false-positive rate", range()), ("true-positive rate", range()), &lines)?;
    let legend = [("gate", HARMFUL), ("the model's own", NATIVE), ("wrong layer", CONTROL), ("chance", MUTED)];
    let native = shown.clone().any(|row| row.role == Role::Native);
    let legend: Vec<_> = legend.into_iter().filter(|(_, colour)| native || *colour != NATIVE).collect();
    let rows = shown.flat_map(|row| {
        row.roc.iter().map(|[x, y]| (Some(row.role), vec![text(&row.name), text(number(*x, 4)), text(number(*y, 4))]))
    });
    Ok(figure(title, svg, &legend, table(&["", "false-positive rate", "true-positive rate"], rows)))
}

/// The gates' directions read at every layer.
pub fn by_layer(detection: &Detection) -> Result<Markup, EvalError> {
    let lines: Vec<Line> = detection
        .gates
        .iter()
        .map(|gate| {
            let own = detection.layers.iter().filter(|layer| layer.gate == gate.gate);
            Line::new(HARMFUL, own.map(|layer| (f64::from(layer.layer.0), layer.auc)).collect())
        })
        .chain(detection.gates.iter().map(|gate| {
            let at = f64::from(gate.layer.0);
            Line { dashed: true, ..Line::new(INK, vec![(at, 0.0), (at, 1.0)]) }
        }))
        .collect();
    let title = "The gate's direction, read at every layer";
    let svg = plots::lines(title, ("layer", None), ("AUC", Some(0.0..1.02)), &lines)?;
    let rows = detection
        .layers
        .iter()
        .map(|layer| (None, vec![text(&layer.gate), text(layer.layer.to_string()), text(number(layer.auc, 3))]));
    let legend = [("AUC", HARMFUL), ("the gate's own layer", INK)];
    Ok(figure(title, svg, &legend, table(&["gate", "layer", "AUC"], rows)))
}

pub fn refusals(steering: &Steering) -> Result<Markup, EvalError> {
    let dot = |colour, behaviour: &Behaviour| {
        let Proportion { share, low, high, .. } = behaviour.refuses;
        (colour, share, low, high)
    };
    let rows: Vec<Dots> = steering
        .rows
        .iter()
        .map(|row| Dots {
            name: row.name.clone(),
            values: vec![dot(HARMFUL, &row.harmful), dot(HARMLESS, &row.harmless)],
        })
        .collect();
    let title = "Prompts that are refused";
    let svg = plots::intervals(title, "share refused or declined", &rows)?;
    let cells = steering.rows.iter().map(|row| {
        let counts = [&row.harmful, &row.harmless].map(|of| text(format!("{} of {}", of.refuses.count, of.refuses.of)));
        (Some(row.role), [text(&row.name)].into_iter().chain(counts).collect())
    });
    let legend = [("harmful prompts", HARMFUL), ("harmless prompts", HARMLESS)];
    Ok(figure(title, svg, &legend, table(&["", "harmful", "harmless"], cells)))
}

/// How often the backdoor fires, and how often the answer is as it should be.
pub fn backdoor(found: &Backdoor) -> Result<Markup, EvalError> {
    let dot = |colour, Proportion { share, low, high, .. }: Proportion| (colour, share, low, high);
    let dots = |name: &str, of: &Conduct| Dots {
        name: name.to_owned(),
        values: vec![dot(HARMFUL, of.fires), dot(HARMLESS, of.clean)],
    };
    let rows: Vec<Dots> = found.rows.iter().map(|row| dots(&row.name, &row.triggered)).collect();
    let title = "Answers to triggered prompts";
    let svg = plots::intervals(title, "share of triggered prompts", &rows)?;
    let cells = found.rows.iter().map(|row| {
        let of = &row.triggered;
        let counts = [of.fires, of.clean].map(|of| text(format!("{} of {}", of.count, of.of)));
        (Some(row.role), [text(&row.name)].into_iter().chain(counts).collect())
    });
    let legend = [("the backdoor fires", HARMFUL), ("the answer is clean", HARMLESS)];
    Ok(figure(title, svg, &legend, table(&["", "fires", "clean"], cells)))
}

/// A sweep over layers: how often the backdoor still fires, and what it costs.
pub fn layer_sweep(sweep: &LayerSweep) -> Result<Vec<Markup>, EvalError> {
    let at = |swept: &SweptConduct| swept.layer.map(|layer| f64::from(layer.0));
    let line = |colour, of: &dyn Fn(&SweptConduct) -> Option<f64>| {
        let points = sweep.layers.iter().filter_map(|swept| Some((at(swept)?, of(swept)?)));
        Line::new(colour, points.filter(|point| point.1.is_finite()).collect())
    };
    let fires = [line(HARMFUL, &|swept| Some(swept.fires)), line(CONTROL, &|swept| Some(swept.broken))];
    let title = "Triggered prompts, by the layer that is steered";
    let svg = plots::lines(title, ("layer", None), ("share of triggered prompts", Some(-0.02..1.02)), &fires)?;
    let legend = [("the backdoor fires", HARMFUL), ("the answer is broken", CONTROL)];
    let layers = |swept: &SweptConduct| swept_layer(swept.layer, swept.source_layer.as_ref());
    let shares = sweep.layers.iter().map(|swept| {
        let shares =
            [swept.fires, swept.clean, swept.broken, swept.fires_untriggered].map(|share| text(percent(share)));
        (None, [text(layers(swept))].into_iter().chain(shares).collect())
    });
    let header = ["layer", "fires", "clean", "broken", "untriggered, fires"];
    let first = figure(title, svg, &legend, table(&header, shares));

    let costs = [line(HARMLESS, &|swept| swept.kl), line(HARMFUL, &|swept| swept.relative_perplexity.map(f64::ln))];
    let title = "What steering at a layer costs";
    let svg = plots::lines(title, ("layer", None), ("nats a token", None), &costs)?;
    let legend =
        [("KL on untriggered answers", HARMLESS), ("surprise of the base at triggered ones, above its own", HARMFUL)];
    let known = |value: Option<f64>, digits| text(value.map(|value| number(value, digits)).unwrap_or_default());
    let rows = sweep
        .layers
        .iter()
        .map(|swept| (None, vec![text(layers(swept)), known(swept.kl, 4), known(swept.relative_perplexity, 2)]));
    let header = ["layer", "KL, nats a token", "perplexity of triggered answers, times the base's"];
    Ok(vec![first, figure(title, svg, &legend, table(&header, rows))])
}

/// A sweep over layers: how often the model refuses, and how probable its logits make it.
pub fn refusal_sweep(sweep: &RefusalSweep) -> Result<Vec<Markup>, EvalError> {
    let line = |colour, of: &dyn Fn(&RefusalsAt) -> Option<f64>| {
        let points = sweep.layers.iter().filter_map(|at| Some((f64::from(at.layer?.0), of(at)?)));
        Line::new(colour, points.filter(|point| point.1.is_finite()).collect())
    };
    let shares = [
        line(HARMFUL, &|at| Some(at.harmful.refuses.share)),
        line(HARMLESS, &|at| Some(at.harmless.refuses.share)),
        line(CONTROL, &|at| Some(at.harmful.broken.share)),
    ];
    let title = "Answers, by the layer that is steered";
    let svg = plots::lines(title, ("layer", None), ("share of prompts", Some(-0.02..1.02)), &shares)?;
    let legend = [
        ("harmful prompts refused", HARMFUL),
        ("harmless prompts refused", HARMLESS),
        ("answers to harmful prompts broken", CONTROL),
    ];
    let layers = |at: &RefusalsAt| text(swept_layer(at.layer, at.source_layer.as_ref()));
    let all = || std::iter::once(&sweep.unguarded).chain(&sweep.layers);
    let rows = all().map(|at| {
        let shares = [at.harmful.refuses, at.harmless.refuses, at.harmful.broken].map(super::tables::share);
        (None, [layers(at)].into_iter().chain(shares).collect())
    });
    let header = ["layer", "harmful refused", "harmless refused", "harmful broken"];
    let first = figure(title, svg, &legend, table(&header, rows));

    let probabilities =
        [line(HARMFUL, &|at| at.harmful.refusal_probability), line(HARMLESS, &|at| at.harmless.refusal_probability)];
    let title = "What the logits say, by the layer that is steered";
    let svg =
        plots::lines(title, ("layer", None), ("probability of a refusing opening", Some(-0.02..1.02)), &probabilities)?;
    let known = |value: Option<f64>| text(value.map(|value| number(value, 2)).unwrap_or_default());
    let rows = all().map(|at| {
        let probability = |of: &Behaviour| text(of.refusal_probability.map(super::tables::percent).unwrap_or_default());
        let cells = [probability(&at.harmful), probability(&at.harmless), known(at.harmless.relative_perplexity)];
        (None, [layers(at)].into_iter().chain(cells).collect())
    });
    let header = ["layer", "harmful", "harmless", "perplexity of answers to harmless ones × unguarded"];
    let legend = [("harmful prompts", HARMFUL), ("harmless prompts", HARMLESS)];
    Ok(vec![first, figure(title, svg, &legend, table(&header, rows))])
}

/// Strength against effect, and against divergence where it was measured.
pub fn strengths(rows: &[StrengthRow]) -> Result<Vec<Markup>, EvalError> {
    let line = |colour, of: &dyn Fn(&StrengthRow) -> Proportion| Line {
        interval: rows.iter().map(|row| (of(row).low, of(row).high)).collect(),
        ..Line::new(colour, rows.iter().map(|row| (row.factor, of(row).share)).collect())
    };
    let effect = [line(HARMFUL, &|row| row.harmful.refuses), line(HARMLESS, &|row| row.harmless.refuses)];
    let title = "Strength against effect";
    let x_name = "strength, as a multiple of the guard's own";
    let svg = plots::lines(title, (x_name, None), ("share refused or declined", Some(0.0..1.02)), &effect)?;
    let cells = rows.iter().map(|row| {
        let shares = [&row.harmful, &row.harmless].map(|of| super::tables::share(of.refuses));
        let broken = super::tables::share(row.harmful.broken);
        let cells = [text(row.factor.to_string())].into_iter().chain(shares).chain([broken]);
        (None, cells.collect())
    });
    let legend = [("harmful prompts", HARMFUL), ("harmless prompts", HARMLESS)];
    let header = ["strength", "harmful refused", "harmless refused", "harmful broken"];
    let mut figures = vec![figure(title, svg, &legend, table(&header, cells))];
    let known: Vec<(f64, f64)> = rows.iter().filter_map(|row| Some((row.factor, row.kl?))).collect();
    if !known.is_empty() {
        let title = "Strength against KL on benign answers";
        let top = known.iter().map(|point| point.1).fold(0.01, f64::max);
        let lines = [Line::new(HARMLESS, known.clone())];
        let svg = plots::lines(title, (x_name, None), ("KL, nats a token", Some(0.0..1.08 * top)), &lines)?;
        let cells = known.iter().map(|(x, kl)| (None, vec![text(x.to_string()), text(number(*kl, 4))]));
        figures.push(figure(title, svg, &[], table(&["strength", "nats a token"], cells)));
    }
    Ok(figures)
}

/// How the divergence is spread over benign prompts.
pub fn divergences(utility: &Utility) -> Result<Option<Markup>, EvalError> {
    let Some(row) = utility.rows.iter().find(|row| row.role == Role::Guard) else { return Ok(None) };
    let mut sorted: Vec<_> = row.by_prompt.clone();
    sorted.sort_by(|a, b| b.nats_per_token.total_cmp(&a.nats_per_token));
    let points: Vec<(f64, f64)> =
        sorted.iter().enumerate().map(|(at, kl)| ((at + 1) as f64, kl.nats_per_token)).collect();
    let top = points.iter().map(|point| point.1).fold(0.01, f64::max);
    let title = "Benign prompts by how far the guard moves their answers";
    let lines = [Line::new(HARMLESS, points)];
    let svg =
        plots::lines(title, ("prompt, most moved first", None), ("KL, nats a token", Some(0.0..1.08 * top)), &lines)?;
    let cells = sorted.iter().map(|kl| {
        (None, vec![text(kl.index.to_string()), text(number(kl.nats_per_token, 4)), text(kl.tokens.to_string())])
    });
    Ok(Some(figure(title, svg, &[], table(&["prompt", "nats a token", "tokens"], cells))))
}

/// Of the pairs of one source layer; several read beside each other have no place on an axis.
pub fn heat_maps(survey: &Survey) -> Result<Vec<Markup>, EvalError> {
    if survey.pairs.iter().all(|pair| pair.source_layer.single().is_none()) {
        return Ok(Vec::new());
    }
    MEASURES
        .into_iter()
        .map(|measure| {
            let single = survey.pairs.iter().filter_map(|pair| Some((pair.source_layer.single()?, pair)));
            let known = single.map(|(source, pair)| (source.0, pair.target_layer.0, (measure.of)(pair)));
            let cells: Vec<(u32, u32, f64)> = known.filter(|cell| cell.2.is_finite()).collect();
            let title = format!("{} by layer pair", measure.name);
            let svg = plots::heat_map(&title, &cells)?;
            let rows = cells.iter().map(|(source, target, value)| {
                (None, vec![text(source.to_string()), text(target.to_string()), text(number(*value, 4))])
            });
            Ok(figure(&title, svg, &[], table(&["source layer", "target layer", measure.name], rows)))
        })
        .collect()
}
