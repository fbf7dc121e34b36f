//! What is asked of a guard while it is in force: to be off, or to act at other strengths than its file says.

use super::{Program, Setting, ToggleError};
use crate::guard::Guard;
use std::collections::BTreeMap;

/// A change to one guard.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    Enabled(bool),
    /// An intervention by its own name, or a group of them (see [`Program::with_setting`]).
    Set {
        intervention: String,
        setting: Setting,
    },
    /// An intervention as its guard has it again.
    Reset {
        intervention: String,
    },
}

/// What has been changed of a guard, whatever its file says.
#[derive(Debug, Clone, PartialEq)]
pub struct Changed {
    pub enabled: bool,
    /// By the intervention's name, or its group's.
    pub settings: BTreeMap<String, Setting>,
}

impl Default for Changed {
    fn default() -> Self {
        Self { enabled: true, settings: BTreeMap::new() }
    }
}

impl Changed {
    /// Takes `changes` to `guard` on top of these, one after another.
    ///
    /// # Errors
    /// The guard has no such intervention; nothing is changed then.
    pub fn take(&mut self, guard: Option<&Guard>, changes: &[Change]) -> Result<(), ToggleError> {
        for change in changes {
            if let Change::Set { intervention, .. } | Change::Reset { intervention } = change
                && !guard.is_some_and(|guard| has_intervention(guard, intervention))
            {
                let known = guard.into_iter().flat_map(|guard| guard.interventions());
                let known = known.map(|intervention| intervention.name.clone()).collect();
                return Err(ToggleError::Unknown { name: intervention.clone(), known });
            }
        }
        for change in changes {
            match change {
                Change::Enabled(enabled) => self.enabled = *enabled,
                Change::Set { intervention, setting } => {
                    self.settings.insert(intervention.clone(), *setting);
                }
                Change::Reset { intervention } => {
                    self.settings.remove(intervention);
                }
            }
        }
        Ok(())
    }

    /// Forgets what was set for interventions that `guard`, as its folder holds it now, has no more.
    pub fn forget_gone(&mut self, guard: Option<&Guard>) {
        self.settings.retain(|name, _| guard.is_some_and(|guard| has_intervention(guard, name)));
    }

    /// Whether all is as the guard's file says.
    pub fn is_nothing(&self) -> bool {
        self.enabled && self.settings.is_empty()
    }

    /// The strengths that these settings give the interventions of `guard`, in their order.
    pub fn strengths(&self, guard: &Guard) -> Vec<f32> {
        let interventions = guard.interventions();
        let mut strengths: Vec<f32> = interventions.iter().map(|intervention| intervention.strength).collect();
        for (name, setting) in &self.settings {
            let meant = is_meant(name, interventions.iter().map(|intervention| intervention.name.as_str()));
            for ((intervention, strength), is_meant) in interventions.iter().zip(&mut strengths).zip(meant) {
                if is_meant {
                    *strength = setting.strength(intervention.strength);
                }
            }
        }
        strengths
    }

    /// `program`, in which `guard` is, as these settings have it.
    ///
    /// # Errors
    /// A strength out of range, or a second switch at a layer.
    pub fn apply(&self, guard: &str, program: Program) -> Result<Program, ToggleError> {
        self.settings.iter().try_fold(program, |program, (name, setting)| {
            let name = program.name_of(guard, name);
            program.with_setting(&name, *setting)
        })
    }
}

impl Program {
    /// What this program calls a gate or an intervention `name` of `guard`: of a single guard the name alone.
    pub fn name_of(&self, guard: &str, name: &str) -> String {
        if self.guards().len() == 1 { name.to_owned() } else { format!("{guard}/{name}") }
    }

    /// What `guard` itself calls the gate or intervention that this program calls `name`.
    pub fn own_name<'n>(&self, guard: &str, name: &'n str) -> &'n str {
        let own = name.strip_prefix(guard).and_then(|rest| rest.strip_prefix('/'));
        own.filter(|_| self.guards().len() > 1).unwrap_or(name)
    }
}

/// Whether an intervention of `guard`, or a group of them, is called `name`.
fn has_intervention(guard: &Guard, name: &str) -> bool {
    is_meant(name, guard.interventions().iter().map(|intervention| intervention.name.as_str())).any(|is_meant| is_meant)
}

/// Of each of the interventions called `names`, whether `name` means it: the one of that name, or else all that go on from it with a dot.
pub(super) fn is_meant<'n>(name: &str, names: impl Iterator<Item = &'n str> + Clone) -> impl Iterator<Item = bool> {
    let is_one = names.clone().any(|other| other == name);
    names.map(move |other| if is_one { other == name } else { is_of(other, name) })
}

/// Whether `name` goes on from `group` with a dot.
fn is_of(name: &str, group: &str) -> bool {
    name.strip_prefix(group).is_some_and(|rest| rest.starts_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::{Calibration, ModelShape};
    use crate::tensor::HiddenSize;
    use std::path::Path;

    fn guard(name: &str) -> Guard {
        Guard::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("guards").join(name)).unwrap()
    }

    #[test]
    fn a_group_is_what_goes_on_with_a_dot() {
        let meant =
            |name| is_meant(name, ["base.14", "base14", "other.base", "base.16"].into_iter()).collect::<Vec<_>>();
        assert_eq!(meant("base"), [true, false, false, true]);
        assert_eq!(meant("base.16"), [false, false, false, true]);
        let exact = is_meant("base", ["base", "base.14"].into_iter()).collect::<Vec<_>>();
        assert_eq!(exact, [true, false]);
        assert!(!meant("ba").contains(&true));
    }

    /// What is said of strengths is what the program has, alone and in a stack, whatever is set on top of what.
    #[test]
    fn strengths_are_those_of_the_program() {
        let (refusal, gate) = (guard("refusal-smollm2"), guard("harm-gate-gemma3-to-smollm2"));
        let names: Vec<&str> = refusal.interventions().iter().map(|intervention| intervention.name.as_str()).collect();
        let shape = ModelShape { n_embd: HiddenSize(576), n_layer: 30 };
        let set = |name: &str, setting| Change::Set { intervention: name.to_owned(), setting };
        let reset = |name: &str| Change::Reset { intervention: name.to_owned() };
        let mut changed = Changed::default();
        for changes in [
            vec![],
            vec![set(names[0], Setting::Strength(0.25))],
            vec![set(names[0], Setting::Off)],
            vec![set(names[0], Setting::On), Change::Enabled(false)],
            vec![reset(names[0])],
        ] {
            changed.take(Some(&refusal), &changes).unwrap();
            for guards in [&[&refusal][..], &[&gate, &refusal]] {
                let program = Program::stack(guards, shape, Calibration::Required).unwrap();
                let program = changed.apply(refusal.name(), program).unwrap();
                let found: Vec<f32> = program.interventions().map(|(_, strength)| strength).collect();
                assert_eq!(found, changed.strengths(&refusal), "{changes:?}");
            }
        }
        assert_eq!(changed, Changed { enabled: false, settings: BTreeMap::new() });
    }

    #[test]
    fn a_change_that_can_not_be_changes_nothing() {
        let guard = guard("refusal-smollm2");
        let mut changed = Changed::default();
        let unknown = Change::Set { intervention: "nothing".into(), setting: Setting::Off };
        let error = changed.take(Some(&guard), &[Change::Enabled(false), unknown]).unwrap_err();
        assert!(error.to_string().contains("`nothing`"), "{error}");
        assert!(changed.is_nothing());
        changed.settings.insert("nothing".into(), Setting::Off);
        changed.forget_gone(Some(&guard));
        assert!(changed.is_nothing());
    }
}
