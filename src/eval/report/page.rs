use super::tables::{number, percent};
use super::{GuardEntry, Report, sections};
use crate::eval::EvalError;
use crate::eval::controls::Role;
use crate::guard::AdapterIdentity;
use maud::{DOCTYPE, Markup, PreEscaped, html};

/// All of the page's looks.
const STYLE: &str = include_str!("style.css");

pub fn page(report: &Report) -> Result<String, EvalError> {
    let mut body = Vec::new();
    if let Some(found) = &report.detection {
        body.push(sections::detection(found)?);
    }
    if let Some(found) = &report.steering {
        body.push(sections::steering(found)?);
    }
    if let Some(found) = &report.utility {
        body.push(sections::utility(found)?);
    }
    if let Some(found) = &report.backdoor {
        body.push(sections::backdoor(found)?);
    }
    if let Some(found) = &report.switch {
        body.push(sections::switch(found));
    }
    for sweep in &report.sweeps {
        body.push(sections::layer_sweep(sweep)?);
    }
    for sweep in &report.refusal_sweeps {
        body.push(sections::refusal_sweep(sweep)?);
    }
    if let Some(found) = &report.survey {
        body.push(sections::survey(found)?);
    }
    let name = report.guard.as_ref().map_or("No guard", |guard| &guard.name);
    let title = format!("{name} on {}", report.model.name);
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { (title) " – Pilotfish evaluation" }
                style { (PreEscaped(STYLE)) }
            }
            body {
                header {
                    p.kicker { "Pilotfish evaluation" }
                    h1 { (name) " " span.on { "on " (report.model.name) } }
                    @if let Some(guard) = report.guard.as_ref().filter(|guard| !guard.description.is_empty()) { p.lead { (guard.description) } }
                    (cards(report))
                }
                main { @for section in &body { (section) } (provenance(report)) }
            }
        }
    };
    Ok(page.into_string())
}

/// The figures that matter most, at a glance.
fn cards(report: &Report) -> Markup {
    let mut cards: Vec<(String, String, String)> = Vec::new();
    if let Some(row) = report.detection.iter().flat_map(|found| &found.rows).find(|row| row.role == Role::Guard) {
        let random = report.detection.iter().flat_map(|found| &found.rows).find(|row| row.role == Role::Random);
        let beside = random.map(|row| format!("random {}", number(row.auc, 3))).unwrap_or_default();
        cards.push(("AUC".into(), number(row.auc, 3), beside));
        let at_1 = row.separation.tpr_at_1_percent;
        let interval = format!("{} to {}", percent(at_1.low), percent(at_1.high));
        cards.push(("TPR at 1 % FPR".into(), percent(at_1.value), interval));
        if let Some(look_alike) = &row.look_alike {
            let interval = format!("{} to {}", number(look_alike.auc.low, 3), number(look_alike.auc.high, 3));
            cards.push(("AUC against look-alikes".into(), number(look_alike.auc.value, 3), interval));
        }
    }
    if let Some(found) = &report.steering {
        let row = |role| found.rows.iter().find(|row| row.role == role);
        if let (Some(guard), Some(none)) = (row(Role::Guard), row(Role::NoGuard)) {
            let card = |name: &str, guard: f64, none: f64| {
                (name.to_owned(), percent(guard), format!("{} unguarded", percent(none)))
            };
            cards.push(card("Harmful refused", guard.harmful.refuses.share, none.harmful.refuses.share));
            cards.push(card("Harmless refused", guard.harmless.refuses.share, none.harmless.refuses.share));
        }
    }
    if let Some(found) = &report.utility {
        let row = |role| found.rows.iter().find(|row| row.role == role);
        if let (Some(guard), Some(none)) = (row(Role::Guard), row(Role::NoGuard)) {
            let random = row(Role::Random).map(|row| format!("random {}", number(row.kl.value, 4))).unwrap_or_default();
            cards.push(("Benign KL, nats a token".into(), number(guard.kl.value, 4), random));
            let unguarded = format!("{} unguarded", percent(none.accuracy.share));
            cards.push(("Questions right".into(), percent(guard.accuracy.share), unguarded));
        }
    }
    if let Some(found) = &report.backdoor {
        let row = |role| found.rows.iter().find(|row| row.role == role);
        let (none, guard) = (row(Role::NoGuard), row(Role::Guard));
        if let (Some(shown), Some(none)) = (guard.or(none), none) {
            let unguarded =
                |share| if guard.is_some() { format!("{} unguarded", percent(share)) } else { String::new() };
            let fires = |name: &str, shown: f64, none: f64| (name.to_owned(), percent(shown), unguarded(none));
            cards.push(fires("Fires when triggered", shown.triggered.fires.share, none.triggered.fires.share));
            cards.push(fires("Clean when triggered", shown.triggered.clean.share, none.triggered.clean.share));
            if let Some(kl) = shown.kl.filter(|_| guard.is_some()) {
                let random = row(Role::Random).and_then(|row| row.kl);
                let random = random.map(|kl| format!("random {}", number(kl.value, 4))).unwrap_or_default();
                cards.push(("Untriggered KL, nats a token".into(), number(kl.value, 4), random));
            }
        }
    }
    html! {
        dl.cards {
            @for (name, value, beside) in cards {
                div { dt { (name) } dd { (value) small { (beside) } } }
            }
        }
    }
}

/// What the figures were made of, so that anybody can make them again.
fn provenance(report: &Report) -> Markup {
    let Report { model, guard, seeds, .. } = report;
    let learnt_on = |guard: &GuardEntry| match &guard.source {
        Some(source) => format!("{}, {}", source.model, source.fingerprint),
        None => "the model itself".into(),
    };
    let of_guard = |fact: &dyn Fn(&GuardEntry) -> String| guard.as_ref().map(fact).unwrap_or_default();
    let also: Vec<_> = report
        .also
        .iter()
        .map(|other| format!("{}, sha256 {}: {}", other.name, other.sha256, other.interventions.join("; ")))
        .collect();
    let adapters = match model.adapters.as_slice() {
        [] => String::new(),
        some => AdapterIdentity::listed(some),
    };
    let facts = [
        ("Command", report.command.join(" ")),
        ("Pilotfish", report.pilotfish.clone()),
        (
            "Model",
            format!(
                "{}: {}, {} layers of {}, {} bytes of tensors",
                model.name, model.architecture, model.n_layer, model.n_embd, model.tensor_bytes
            ),
        ),
        ("Adapters", adapters),
        ("Model's fingerprint", model.fingerprint.clone()),
        ("Guard's sha256", of_guard(&|guard| guard.sha256.to_string())),
        ("Learnt on", of_guard(&learnt_on)),
        ("Gates", of_guard(&|guard| guard.gates.join("; "))),
        ("Interventions", of_guard(&|guard| guard.interventions.join("; "))),
        ("Beside it", also.join(" | ")),
        ("Seeds", format!("bootstrap {}, random controls 0 to {}", seeds.bootstrap, seeds.controls.saturating_sub(1))),
    ];
    html! {
        section {
            h2 { "How it was measured" }
            dl.facts {
                @for (name, fact) in facts.into_iter().filter(|(_, fact)| !fact.is_empty()) {
                    dt { (name) } dd { (fact) }
                }
                @for prompts in &report.prompts {
                    dt { "Prompts, " (prompts.role) }
                    dd { (prompts.prompts) " of " (prompts.file) ", sha256 " (prompts.sha256) }
                }
            }
        }
    }
}
