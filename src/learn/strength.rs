/// Where strengths are looked for, and what for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StrengthOptions {
    /// The least effect that will do.
    pub target: f64,
    /// Strengths that are tried first, evenly from the first to the second, both tried.
    pub range: (f64, f64),
    /// How many of them, two at least.
    pub coarse: usize,
    /// Halvings of each interval in which the effect comes to the target or falls below it.
    pub halvings: usize,
}

impl Default for StrengthOptions {
    /// Nine strengths from 0 to 8, then to within a 32nd of their distance. The target is for the caller to say.
    fn default() -> Self {
        Self { target: 0.0, range: (0.0, 8.0), coarse: 9, halvings: 5 }
    }
}

/// What a strength gave.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TriedStrength {
    pub strength: f64,
    pub effect: f64,
    /// To the unguarded model.
    pub kl: f64,
}

#[derive(Debug, Clone, PartialEq)]
pub struct StrengthSearch {
    /// In the order of their strengths.
    pub tried: Vec<TriedStrength>,
    /// Of those whose effect meets the target, the one with the least KL; `None` where none does.
    pub chosen: Option<TriedStrength>,
}

/// The strength that has the effect wanted at the least divergence from the unguarded model, as far as a coarse grid and halving find it.
///
/// `measure` gives effect and KL at a strength. The effect need not be monotone (too strong an intervention wrecks what it is to steer): every interval
/// of the grid in which it crosses the target is halved. What rises and falls between two strengths of the grid is not seen. A measurement that is
/// no number meets no target.
///
/// # Errors
/// Those of `measure`.
pub fn search_strength<E>(
    options: StrengthOptions,
    mut measure: impl FnMut(f64) -> Result<(f64, f64), E>,
) -> Result<StrengthSearch, E> {
    let (low, high) = options.range;
    let coarse = options.coarse.max(2);
    let mut tried = Vec::new();
    let mut at = |strength: f64, tried: &mut Vec<TriedStrength>| -> Result<bool, E> {
        let (effect, kl) = measure(strength)?;
        tried.push(TriedStrength { strength, effect, kl });
        Ok(effect >= options.target)
    };
    let mut grid = Vec::with_capacity(coarse);
    for index in 0..coarse {
        let strength = low + (high - low) * index as f64 / (coarse - 1) as f64;
        grid.push((strength, at(strength, &mut tried)?));
    }
    for pair in grid.windows(2) {
        let ((mut from, meets), (mut to, also_meets)) = (pair[0], pair[1]);
        if meets == also_meets {
            continue;
        }
        for _ in 0..options.halvings {
            let middle = f64::midpoint(from, to);
            if at(middle, &mut tried)? == meets { from = middle } else { to = middle }
        }
    }
    tried.sort_by(|a, b| a.strength.total_cmp(&b.strength));
    let meeting = tried.iter().filter(|tried| tried.effect >= options.target && !tried.kl.is_nan());
    let chosen =
        meeting.min_by(|a, b| a.kl.total_cmp(&b.kl).then(a.strength.abs().total_cmp(&b.strength.abs()))).copied();
    Ok(StrengthSearch { tried, chosen })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    fn search(options: StrengthOptions, effect: impl Fn(f64) -> f64, kl: impl Fn(f64) -> f64) -> StrengthSearch {
        search_strength(options, |strength| Ok::<_, Infallible>((effect(strength), kl(strength)))).unwrap()
    }

    #[test]
    fn it_comes_close_to_the_least_strength_that_does() {
        let options = StrengthOptions { target: 0.8, ..Default::default() };
        let found = search(options, |s| 1.0 - (-s).exp(), |s| 0.01 * s * s);
        let (chosen, least) = (found.chosen.unwrap(), 5f64.ln());
        assert!((least..least + 1.0 / 32.0).contains(&chosen.strength), "{chosen:?}");
        assert_eq!(found.tried.len(), 9 + 5);
        assert!(found.tried.is_sorted_by(|a, b| a.strength < b.strength));
    }

    #[test]
    fn an_effect_that_rises_and_falls_is_met_where_it_costs_least() {
        // Meets the target from 3 to 5 and again from 7 on; KL falls, so the later crossing of each is as good a place to look.
        let effect = |s: f64| if (3.0..=5.0).contains(&s) || s >= 7.0 { 1.0 } else { 0.0 };
        let options = StrengthOptions { target: 0.5, halvings: 8, ..Default::default() };
        let rising = search(options, effect, |s| s).chosen.unwrap();
        assert!((3.0..3.01).contains(&rising.strength), "{rising:?}");
        let valley = search(options, effect, |s| (s - 5.0).abs()).chosen.unwrap();
        assert!((4.99..=5.0).contains(&valley.strength), "{valley:?}");
    }

    #[test]
    fn what_can_not_be_reached_is_none_and_what_was_tried_is_told() {
        let options = StrengthOptions { target: 2.0, coarse: 5, ..Default::default() };
        let found = search(options, |s| s / 8.0, |s| s);
        assert_eq!((found.chosen, found.tried.len()), (None, 5));
        let no_number = search(options, |_| f64::NAN, |s| s);
        assert_eq!(no_number.chosen, None);
        // Met everywhere: nothing to halve.
        let all = search(StrengthOptions { target: -1.0, ..options }, |s| s, |s| s);
        assert_eq!((all.chosen.unwrap().strength, all.tried.len()), (0.0, 5));
    }

    #[test]
    fn an_error_ends_it() {
        let mut n = 0;
        let failed = search_strength(StrengthOptions::default(), |s| {
            n += 1;
            if n == 3 { Err("no model") } else { Ok((s, s)) }
        });
        assert_eq!((failed, n), (Err("no model"), 3));
    }
}
