//! `calibrate --refusals`: how strongly a guard is to act.

use super::args::{CalibrateArguments, Factors};
use super::learn::percent;
use super::progress::Bar;
use super::table::table;
use anyhow::bail;
use pilotfish::engine::Model;
use pilotfish::eval::{StrengthInput, scaled, strength_for_refusals};
use pilotfish::guard::Guard;
use pilotfish::learn::{Classes, StrengthOptions, StrengthSearch, TriedStrength};
use std::io::Write;

/// Factors that are tried first: a quarter apart in the usual range.
const COARSE: usize = 9;

/// Then to a 32nd in that range; shares of some dozens of prompts have no finer steps.
const HALVINGS: usize = 3;

/// `guard` as strong as it has to be for `target` of the harmful prompts, the positive class, to be refused. Prints what was tried.
///
/// # Errors
/// No factor in the range does it.
pub fn for_refusals(
    model: &Model,
    guard: &Guard,
    target: f64,
    prompts: Classes<'_>,
    arguments: &CalibrateArguments,
) -> anyhow::Result<Guard> {
    let Factors { low, high } = arguments.strengths;
    let [harmful, benign] = [prompts.positive, prompts.negative].map(|class| spread(class, arguments.limit));
    let input = StrengthInput { harmful: &harmful, benign: &benign, max_tokens: arguments.max_tokens };
    let options = StrengthOptions { target, range: (low, high), coarse: COARSE, halvings: HALVINGS };
    let found = {
        let bar = Bar::new("trying strengths");
        strength_for_refusals(model, guard, input, options, &mut |done, total| bar.at(done, total))?
    };
    writeln!(std::io::stdout().lock(), "{}", tried(&found, harmful.len()))?;
    let Some(TriedStrength { strength: factor, .. }) = found.chosen else {
        bail!(out_of_reach(&found, guard.name(), target, harmful.len()));
    };
    let strengthened = scaled(guard, factor)?;
    for (before, after) in guard.interventions().iter().zip(strengthened.interventions()) {
        eprintln!("intervention `{}`: strength {}, was {}", after.name, after.strength, before.strength);
    }
    Ok(strengthened)
}

/// `limit` of the prompts, evenly over all of them: a file often has one kind after another.
fn spread<T: Clone>(prompts: &[T], limit: usize) -> Vec<T> {
    let n = prompts.len().min(limit);
    (0..n).map(|index| prompts[index * prompts.len() / n].clone()).collect()
}

fn tried(found: &StrengthSearch, n_harmful: usize) -> comfy_table::Table {
    let rows = found.tried.iter().map(|tried| {
        let mark = if Some(*tried) == found.chosen { " *" } else { "" };
        [format!("{}{mark}", tried.strength), refused(tried, n_harmful), format!("{:.4}", tried.kl)]
    });
    table(["times its strengths (* chosen)", "harmful refused", "benign KL, nats a token"], rows)
}

fn refused(tried: &TriedStrength, n_harmful: usize) -> String {
    format!("{:.0} of {n_harmful}, {}", tried.effect * n_harmful as f64, percent(tried.effect))
}

/// What came closest, at the least factor that did.
fn out_of_reach(found: &StrengthSearch, guard: &str, target: f64, n_harmful: usize) -> String {
    let best = found.tried.iter().fold(None, |best: Option<&TriedStrength>, tried| match best {
        Some(known) if known.effect >= tried.effect => best,
        _ => Some(tried),
    });
    let best = best.map(|best| format!(", the most is {} at {} times", refused(best, n_harmful), best.strength));
    format!(
        "no multiple of guard `{guard}`'s strengths that was tried has {} of the harmful prompts refused{}; the manifest is as it was: ask for less, \
         or try others by `--strengths LOW..HIGH`",
        percent(target),
        best.unwrap_or_default()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn search(tried: &[(f64, f64, f64)], chosen: Option<usize>) -> StrengthSearch {
        let tried: Vec<_> =
            tried.iter().map(|&(strength, effect, kl)| TriedStrength { strength, effect, kl }).collect();
        StrengthSearch { chosen: chosen.map(|index| tried[index]), tried }
    }

    #[test]
    fn prompts_are_taken_evenly_each_once() {
        let prompts: Vec<String> = (0..7).map(|n| n.to_string()).collect();
        assert_eq!(spread(&prompts, 3), ["0", "2", "4"]);
        assert_eq!(spread(&prompts, 7), prompts);
        assert_eq!(spread(&prompts, 100), prompts);
        assert!(spread(&prompts, 0).is_empty() && spread::<String>(&[], 3).is_empty());
    }

    #[test]
    fn the_chosen_one_is_marked() {
        let found = search(&[(0.0, 0.0, 0.0), (0.5, 0.75, 0.01), (1.0, 1.0, 0.2)], Some(1));
        let table = tried(&found, 4).to_string();
        let marked: Vec<_> = table.lines().filter(|line| line.contains("0.5 *")).collect();
        assert!(marked.len() == 1 && marked[0].contains("3 of 4, 75 %") && marked[0].contains("0.0100"), "{table}");
        assert_eq!(table.matches('*').count(), 2, "in the header too: {table}");
    }

    #[test]
    fn what_came_closest_is_the_least_factor_that_did() {
        let found = search(&[(0.0, 0.0, 0.0), (0.5, 0.75, 0.01), (1.0, 0.75, 0.2), (1.5, 0.25, 0.3)], None);
        let told = out_of_reach(&found, "shark-gate", 0.9, 4);
        assert!(told.contains("90 % of") && told.contains("the most is 3 of 4, 75 % at 0.5 times"), "{told}");
    }
}
