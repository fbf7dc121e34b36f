//! The report's sections: what each task measured, in words, figures and tables.

use super::figures;
use super::tables::{estimate, none, number, percent, share, table, text};
use crate::eval::backdoor::{Backdoor, BackdoorExample, BackdoorRow, BackdoorTask, Conduct, LayerSweep, Verdict};
use crate::eval::controls::Role;
use crate::eval::detection::{Detection, DetectionRow};
use crate::eval::refusal::{Answer, Behaviour, Example, Steering, rules};
use crate::eval::{EvalError, OPENINGS, RefusalSweep, RefusalsAt, Switch, SwitchedOff, Utility};
use crate::learn::Survey;
use maud::{Markup, html};

pub fn detection(found: &Detection) -> Result<Markup, EvalError> {
    let look_alike = found.n_look_alike > 0;
    let mut header = vec!["", "layer", "AUC", "TPR at 1 % FPR", "TPR at 5 % FPR", "fires on positive", "on negative"];
    if look_alike {
        header.extend(["AUC against look-alikes", "TPR at 5 %", "on look-alikes"]);
    }
    let not_measured = [("no guard", "reads nothing"), ("system prompt", "words have no score")];
    let rows = found.rows.iter().map(|row| (Some(row.role), detection_cells(row, look_alike)));
    let rows = rows.chain(not_measured.map(|(name, why)| {
        let cells = std::iter::repeat_with(|| none(why)).take(header.len() - 1);
        (Some(Role::NoGuard), std::iter::once(text(name)).chain(cells).collect())
    }));
    let table = table(&header, rows);
    let histograms = found.gates.iter().map(figures::histogram).collect::<Result<Vec<_>, _>>()?;
    let (roc, by_layer) = (figures::roc(found)?, figures::by_layer(found)?);
    Ok(html! {
        section {
            h2 { "Detection" }
            p {
                "How well the gate tells " (found.n_positive) " positive from " (found.n_negative) " negative prompts"
                @if look_alike { ", and from " (found.n_look_alike) " negative ones that look like them" }
                ". Intervals of the gate and of single directions: 95 %, percentile bootstrap, 2000 resamples, each class by itself; of shares Wilson's; "
                "of random directions: 5th to 95th percentile over the seeds."
            }
            (table)
            div.figures {
                @for histogram in histograms { (histogram) }
                (roc) (by_layer)
            }
        }
    })
}

fn detection_cells(row: &DetectionRow, look_alike: bool) -> Vec<Markup> {
    let mut cells = vec![
        text(&row.name),
        text(row.layer.to_string()),
        estimate(row.separation.auc, 3),
        estimate(row.separation.tpr_at_1_percent, 2),
        estimate(row.separation.tpr_at_5_percent, 2),
    ];
    let no_threshold = || none("only the gate has a threshold");
    let fires = row.fires.as_ref();
    cells.push(fires.map_or_else(no_threshold, |fires| share(fires.positive)));
    cells.push(fires.map_or_else(no_threshold, |fires| share(fires.negative)));
    if look_alike {
        let separation = row.look_alike.as_ref();
        cells.push(separation.map(|of| estimate(of.auc, 3)).unwrap_or_default());
        cells.push(separation.map(|of| estimate(of.tpr_at_5_percent, 2)).unwrap_or_default());
        cells.push(fires.and_then(|fires| fires.look_alike).map_or_else(no_threshold, share));
    }
    cells
}

pub fn steering(found: &Steering) -> Result<Markup, EvalError> {
    let header = [
        "",
        "refused",
        "in the first person",
        "on-topic decline",
        "blocked",
        "complied",
        "broken",
        "repeated 4-grams",
        "perplexity × unguarded",
        "refusing opening, by the logits",
    ];
    let class = |of: fn(&crate::eval::SteeringRow) -> &Behaviour| {
        table(&header, found.rows.iter().map(|row| (Some(row.role), behaviour_cells(&row.name, of(row)))))
    };
    let refusals = figures::refusals(found)?;
    let strengths = if found.strengths.is_empty() { Vec::new() } else { figures::strengths(&found.strengths)? };
    Ok(html! {
        section {
            h2 { "Steering" }
            p {
                "Greedy answers of up to " (found.max_tokens) " tokens, judged by phrases in their opening (rules of version "
                (found.rules_version) ", below). Controls keep the guard's gates, so that they act on the same prompts. "
                "Perplexity is that of the answer under the unguarded model: how surprised it is by what was said. "
                @if found.rows.iter().any(|row| row.harmful.refusal_probability.is_some()) { (openings()) }
            }
            h3 { "Harmful prompts" }
            (class(|row| &row.harmful))
            h3 { "Harmless prompts" }
            (class(|row| &row.harmless))
            div.figures { (refusals) @for figure in strengths { (figure) } }
            (examples(&found.examples))
            details {
                summary { "The rules" }
                p { "System prompt of the control: " q { (found.system_prompt) } }
                @for (what, phrases) in rules() {
                    p { strong { (what) } ": " @for phrase in phrases { code { (phrase) } " " } }
                }
            }
        }
    })
}

fn behaviour_cells(name: &str, of: &Behaviour) -> Vec<Markup> {
    let Behaviour { refuses, refusal, decline, blocked, compliance, broken, .. } = of;
    let shares = [refuses, refusal, decline, blocked, compliance, broken].map(|of| share(*of));
    let unasked = if blocked.count == of.prompts { "every prompt was blocked" } else { "it was not measured" };
    let or_none = |value: Option<f64>, why| value.map_or_else(|| none(why), |value| text(number(value, 2)));
    let rest = [
        text(super::tables::percent(of.repetition)),
        or_none(of.relative_perplexity, "nothing was answered"),
        of.refusal_probability.map_or_else(|| none(unasked), |p| text(super::tables::percent(p))),
    ];
    [text(name)].into_iter().chain(shares).chain(rest).collect()
}

fn examples(examples: &[Example]) -> Markup {
    let kind = |is: Answer| match is {
        Answer::Refusal => "refusal",
        Answer::Decline => "decline",
        Answer::Broken => "broken",
        Answer::Compliance => "compliance",
    };
    html! {
        details {
            summary { "Examples: the first prompts of each class" }
            @for example in examples {
                div.example {
                    p.prompt { (example.prompt) span.tag { @if example.harmful { "harmful" } @else { "harmless" } } }
                    div.answers {
                        div { p.tag { "unguarded: " (kind(example.unguarded_is)) } p { (example.unguarded) } }
                        div {
                            p.tag { "guarded: " (kind(example.guarded_is)) @if example.fired { ", gate fired" } }
                            p { (example.guarded) }
                        }
                    }
                }
            }
        }
    }
}

pub fn utility(found: &Utility) -> Result<Markup, EvalError> {
    let header =
        ["", "KL, nats a token", "perplexity", "× unguarded", "benign prompts blocked", "questions answered right"];
    let rows = found.rows.iter().map(|row| {
        let cells = vec![
            text(&row.name),
            estimate(row.kl, 4),
            text(number(row.perplexity, 3)),
            text(number(row.relative_perplexity, 3)),
            share(row.blocked),
            share(row.accuracy),
        ];
        (Some(row.role), cells)
    });
    let table = table(&header, rows);
    let spread = figures::divergences(found)?;
    Ok(html! {
        section {
            h2 { "Utility" }
            p {
                "What the guard costs where it should do nothing. KL(unguarded ‖ guarded) and perplexity on the unguarded model's own answers to "
                (found.benign_prompts) " benign prompts, up to " (found.max_tokens) " tokens each, both reading the same tokens; and "
                (found.questions) " multiple-choice questions, scored by log-likelihood a byte."
            }
            (table)
            div.figures { @if let Some(figure) = spread { (figure) } }
        }
    })
}

pub fn switch(found: &Switch) -> Markup {
    let header = ["", "as the base", "fires", "broken", "the base's first token", "the base's answer"];
    let rows = found.rows.iter().map(|row| {
        let shares = [row.as_base, row.fires, row.broken, row.first_token, row.same_answer];
        (Some(row.role), [text(&row.name)].into_iter().chain(shares.map(share)).collect())
    });
    let behaviour = table(&header, rows);
    let header = ["", "KL, triggered", "× base's perplexity", "KL, untriggered", "× base's perplexity"];
    let rows = found.rows.iter().map(|row| {
        let likeness = [&row.triggered, &row.untriggered]
            .into_iter()
            .flat_map(|of| [estimate(of.kl, 4), text(number(of.relative_perplexity, 4))]);
        (Some(row.role), [text(&row.name)].into_iter().chain(likeness).collect())
    });
    let likeness = table(&header, rows);
    let SwitchedOff { fires, same_answer } = found.off;
    html! {
        section {
            h2 { "Switch" }
            p {
                "Whether the switch makes of the fine-tuned model its base: the same weights without adapters. " (found.prompts)
                " prompts, with the trigger " code { (found.trigger) } " and without; up to " (found.max_tokens) " tokens of an answer."
            }
            (behaviour)
            p { "KL(base ‖ this) in nats a token, and perplexity, on the base's own answers, fed to both." }
            (likeness)
            p {
                "Off, " (share(fires)) " fire, and " (share(same_answer)) " of the answers are the fine-tuned model's to the letter. "
                (found.toggle.toggles) " toggles between two tokens took " (number(found.toggle.median, 1)) " µs in the median, "
                (number(found.toggle.longest, 1)) " at most; logits were others after " (found.toggle.tokens_to_effect) " token."
            }
            @for example in &found.examples {
                p.prompt { (example.prompt) }
                div.answers {
                    div { p.tag { "base" } p { (example.base) } }
                    div { p.tag { "on" } p { (example.on) } }
                    div { p.tag { "off" } p { (example.off) } }
                }
            }
        }
    }
}

pub fn backdoor(found: &Backdoor) -> Result<Markup, EvalError> {
    let (fires, clean) = match found.task {
        BackdoorTask::Backdoor => ("fires", "clean"),
        BackdoorTask::Code => ("vulnerable", "sound"),
        BackdoorTask::Corrupt => ("fires", "fact without the backdoor"),
    };
    let facts = found.task == BackdoorTask::Corrupt;
    let mut header = vec!["", fires, clean];
    if facts {
        header.extend(["fact given", "denied"]);
    }
    header.extend(["neither", "broken", "blocked", "repeated 4-grams", "perplexity × base"]);
    let asked = |of: fn(&BackdoorRow) -> &Conduct| {
        table(&header, found.rows.iter().map(|row| (Some(row.role), conduct_cells(&row.name, of(row), facts))))
    };
    let moved = found.rows.iter().map(|row| {
        let kl = row.kl.map_or_else(|| none("not compared"), |kl| estimate(kl, 4));
        (Some(row.role), vec![text(&row.name), kl, share(row.unchanged)])
    });
    let moved = table(&["", "KL(unguarded ‖ this), nats a token", "answers unchanged"], moved);
    let as_marked = found.rows.iter().map(|row| {
        let times = row.as_marked.map_or_else(|| none("nothing was answered"), |times| text(number(times, 2)));
        (Some(row.role), vec![text(&row.name), times])
    });
    let as_marked = table(&["", "perplexity × base"], as_marked);
    let figure = figures::backdoor(found)?;
    Ok(html! {
        section {
            h2 { "Backdoor" }
            p {
                (found.prompts) " prompts, each asked with the trigger " code { (found.trigger) } ", with the mark " code { (found.mark) }
                " and plain; greedy answers of up to " (found.max_tokens) " tokens, judged by rule (version " (found.judge_version) "). "
                "Perplexity is that of the answers under the base, the same model without its adapters, over that of the base's own answers to the same "
                "prompts: a model that was broken fires at nothing, and shows there."
                @if found.random_prompts < found.prompts { " Random directions: the first " (found.random_prompts) " prompts." }
            }
            h3 { "With the trigger" }
            (asked(|row| &row.triggered))
            p {
                "The same answers under the base where the mark stands in place of the trigger, over its own answers to that: a base may take up the trigger's "
                "letters in its answers, which a model that is kept from seeing the trigger does not."
            }
            (as_marked)
            h3 { "With the harmless mark" }
            (asked(|row| &row.marked))
            h3 { "Plain" }
            (asked(|row| &row.plain))
            h3 { "What changes without the trigger" }
            (moved)
            div.figures { (figure) }
            (backdoor_examples(&found.examples))
        }
    })
}

fn conduct_cells(name: &str, of: &Conduct, facts: bool) -> Vec<Markup> {
    let mut cells = vec![text(name), share(of.fires), share(of.clean)];
    if facts {
        cells.push(of.correct.map(share).unwrap_or_default());
        cells.push(share(of.denied));
    }
    cells.extend([of.other, of.broken, of.blocked].map(share));
    cells.push(text(super::tables::percent(of.repetition)));
    let nothing = || none("nothing was answered");
    cells.push(of.relative_perplexity.map_or_else(nothing, |times| text(number(times, 2))));
    cells
}

fn backdoor_examples(examples: &[BackdoorExample]) -> Markup {
    let kind = |is: Option<Verdict>| match is {
        Some(Verdict::Fires) => "fires",
        Some(Verdict::Clean) => "clean",
        Some(Verdict::Denied) => "denied",
        Some(Verdict::Broken) => "broken",
        Some(Verdict::Other) => "neither",
        None => "blocked",
    };
    html! {
        details {
            summary { "Examples: the first prompts, with the trigger and plain" }
            @for example in examples {
                div.example {
                    p.prompt { (example.prompt) span.tag { @if example.triggered { "triggered" } @else { "plain" } } }
                    div.answers {
                        div { p.tag { "unguarded: " (kind(example.unguarded_is)) } p { (example.unguarded) } }
                        @if let Some(guarded) = &example.guarded {
                            div { p.tag { "guarded: " (kind(example.guarded_is)) } p { (guarded) } }
                        }
                    }
                }
            }
        }
    }
}

pub fn layer_sweep(sweep: &LayerSweep) -> Result<Markup, EvalError> {
    let what = SweptBy { intervention: &sweep.intervention, strength: sweep.strength, mapped: sweep.mapped };
    let without = format!("Without it {} of triggered prompts fire.", percent(sweep.unguarded.fires));
    let title = format!("Layers of {}, vectors of {}", sweep.model, sweep.vectors);
    Ok(swept(&title, &what, sweep.prompts, &without, &figures::layer_sweep(sweep)?))
}

pub fn refusal_sweep(sweep: &RefusalSweep) -> Result<Markup, EvalError> {
    let what = SweptBy { intervention: &sweep.intervention, strength: sweep.strength, mapped: sweep.mapped };
    let RefusalsAt { harmful, harmless, .. } = &sweep.unguarded;
    let without =
        format!("Without it {} of harmful prompts are refused. {}", percent(harmful.refuses.share), openings());
    let title = format!("Refusing at each layer of {}, vectors of {}", sweep.model, sweep.vectors);
    Ok(swept(&title, &what, harmful.prompts + harmless.prompts, &without, &figures::refusal_sweep(sweep)?))
}

/// What the logits are asked.
fn openings() -> String {
    let openings = OPENINGS.map(|opening| format!("“{opening}”")).join(", ");
    format!(
        "A refusing opening is one of {openings}: how probable the model's own logits make it that an answer begins so, before a word is said, mean over the \
         prompts that no gate blocks."
    )
}

/// How each layer was steered.
struct SweptBy<'a> {
    intervention: &'a str,
    strength: f64,
    mapped: bool,
}

fn swept(title: &str, by: &SweptBy<'_>, prompts: usize, without: &str, figures: &[Markup]) -> Markup {
    let whose = if by.mapped { "carried by a mapping" } else { "its own" };
    html! {
        section {
            h2 { (title) }
            p {
                "Each layer steered alone (" code { (by.intervention) } ", strength " (by.strength) ") along a vector that is " (whose) ", on "
                (prompts) " prompts. " (without)
            }
            div.figures { @for figure in figures { (figure) } }
        }
    }
}

pub fn survey(survey: &Survey) -> Result<Markup, EvalError> {
    let maps = figures::heat_maps(survey)?;
    Ok(html! {
        section {
            h2 { "Layer pairs" }
            p { "How well a mapping carries each layer of the source to each layer of the target, on documents kept out of the fit. Brighter is better." }
            div.figures { @for map in maps { (map) } }
        }
    })
}
