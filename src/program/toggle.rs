//! Programs that differ in the strengths of their interventions alone: how one is turned on and off between two tokens.
//!
//! A program with an intervention turned is another program: the one that its guards would compile to at these strengths, bit for bit, with
//! neighbours fused as they are then. It shares with the first whatever is as large as a matrix, so that making it costs microseconds.

use super::change::is_meant;
use super::form::Form;
use super::fuse::fuse;
use super::{Condition, HookPoint, Patch, Program};
use crate::tensor::LayerIndex;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;
use std::sync::Arc;

/// An intervention that a program may run, off or on.
#[derive(Debug, Clone)]
pub struct Dial {
    /// As its guard has it, and in a stack of several guards `GUARD/INTERVENTION`.
    pub name: String,
    pub layer: LayerIndex,
    /// As its guard has it.
    pub loaded: f32,
    pub(super) condition: Condition,
    pub(super) form: Form,
}

/// What an intervention is set to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Setting {
    /// It does nothing: residuals stay as they are to the last bit.
    Off,
    /// The strength of its guard; where that is 0, 1.
    On,
    /// In the units that its guard has it in.
    Strength(f32),
}

/// Why an intervention could not be set.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ToggleError {
    #[error("no intervention is called `{name}`; there {}", listed(.known))]
    Unknown { name: String, known: Vec<String> },
    #[error("intervention `{name}` can't have the strength {strength}: its values do not fit in `f32` then")]
    Strength { name: String, strength: f32 },
    #[error(
        "layer {layer} would have two switches, `{first}` and `{second}`: the second would undo the first; turn one off"
    )]
    TwoSwitches { layer: LayerIndex, first: String, second: String },
}

fn listed(known: &[String]) -> String {
    if known.is_empty() { "are none".into() } else { format!("are `{}`", known.join("`, `")) }
}

impl FromStr for Setting {
    type Err = String;

    /// `on`, `off` or a strength.
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Self::Off),
            "on" => Ok(Self::On),
            _ => match text.parse() {
                Ok(strength) if f32::is_finite(strength) => Ok(Self::Strength(strength)),
                _ => Err(format!("`{text}` is no setting; give `on`, `off` or a strength")),
            },
        }
    }
}

impl Serialize for Setting {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Off => serializer.serialize_str("off"),
            Self::On => serializer.serialize_str("on"),
            Self::Strength(strength) => serializer.serialize_f32(*strength),
        }
    }
}

impl<'de> Deserialize<'de> for Setting {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a setting is `on`, `off` or a strength")]
        enum Written {
            Word(String),
            Strength(f64),
        }
        match Written::deserialize(deserializer)? {
            Written::Word(word) => word.parse().map_err(D::Error::custom),
            Written::Strength(strength) if (strength as f32).is_finite() => Ok(Self::Strength(strength as f32)),
            Written::Strength(strength) => Err(D::Error::custom(format!("the strength {strength} is out of range"))),
        }
    }
}

impl Setting {
    /// The strength of an intervention whose guard has it at `loaded`.
    pub(super) fn strength(self, loaded: f32) -> f32 {
        match self {
            Self::Off => 0.0,
            Self::On if loaded == 0.0 => 1.0,
            Self::On => loaded,
            Self::Strength(strength) => strength,
        }
    }
}

impl Program {
    /// Every intervention of the guards in their order, also those that are off, with the strength that it has in this program.
    pub fn interventions(&self) -> impl Iterator<Item = (&Dial, f32)> {
        self.dials.iter().zip(self.strengths.iter().copied())
    }

    /// This program with the interventions of that name set: the one called `name`, or all whose names go on from `name` with a dot, as
    /// `base.14` and `base.16` do from `base`.
    ///
    /// # Errors
    /// No intervention of that name, a strength out of range, or a second switch at a layer.
    pub fn with_setting(&self, name: &str, setting: Setting) -> Result<Self, ToggleError> {
        self.at(self.strengths_with(name, setting)?)
    }

    /// Whether an intervention goes by that name, for [`with_setting`](Self::with_setting).
    pub fn has_intervention(&self, name: &str) -> bool {
        is_meant(name, self.dials.iter().map(|dial| dial.name.as_str())).any(|is_meant| is_meant)
    }

    /// Whether the two are the same guards, loaded once, at whatever strengths.
    pub fn differs_in_strengths_alone(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.dials, &other.dials)
    }

    /// The strengths of [`with_setting`](Self::with_setting).
    pub(super) fn strengths_with(&self, name: &str, setting: Setting) -> Result<Vec<f32>, ToggleError> {
        if !self.has_intervention(name) {
            let known = self.dials.iter().map(|dial| dial.name.clone()).collect();
            return Err(ToggleError::Unknown { name: name.to_owned(), known });
        }
        let meant = is_meant(name, self.dials.iter().map(|dial| dial.name.as_str()));
        let set =
            |((dial, now), is_meant): ((&Dial, f32), bool)| if is_meant { setting.strength(dial.loaded) } else { now };
        Ok(self.interventions().zip(meant).map(set).collect())
    }

    /// This program at other strengths, one for each of its interventions.
    pub(super) fn at(&self, strengths: Vec<f32>) -> Result<Self, ToggleError> {
        let changed = self.interventions().zip(&strengths).filter(|((_, now), wanted)| now != *wanted);
        let changed: BTreeSet<LayerIndex> = changed.map(|((dial, _), _)| dial.layer).collect();
        let mut points: BTreeMap<LayerIndex, HookPoint> =
            self.points.iter().map(|point| (point.layer, point.clone())).collect();
        for layer in changed {
            let empty = || HookPoint { layer, readouts: Vec::new(), patches: Vec::new() };
            let point = points.entry(layer).or_insert_with(empty);
            point.patches = fuse(self.patches(layer, &strengths)?, self.width.0);
        }
        let points = points.into_values().filter(|point| !point.readouts.is_empty() || !point.patches.is_empty());
        let points = points.collect();
        Ok(Self { points, strengths, ..self.clone() })
    }

    /// What acts at `layer`, in order.
    fn patches(&self, layer: LayerIndex, strengths: &[f32]) -> Result<Vec<Patch>, ToggleError> {
        let mut switch: Option<&Dial> = None;
        let mut patches = Vec::new();
        let acting =
            self.dials.iter().zip(strengths).filter(|(dial, strength)| dial.layer == layer && **strength != 0.0);
        for (dial, strength) in acting {
            if dial.form.is_switch()
                && let Some(first) = switch.replace(dial)
            {
                return Err(ToggleError::TwoSwitches { layer, first: first.name.clone(), second: dial.name.clone() });
            }
            let op = dial.form.at(*strength);
            let op = op.ok_or_else(|| ToggleError::Strength { name: dial.name.clone(), strength: *strength })?;
            patches.push(Patch { op, condition: dial.condition.clone() });
        }
        Ok(patches)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_words_or_strengths() {
        assert_eq!("off".parse(), Ok(Setting::Off));
        assert_eq!("on".parse(), Ok(Setting::On));
        assert_eq!("-0.5".parse(), Ok(Setting::Strength(-0.5)));
        for wrong in ["", "of", "inf", "NaN", "1,5"] {
            assert!(wrong.parse::<Setting>().is_err(), "{wrong}");
        }
        for (setting, written) in
            [(Setting::Off, "\"off\""), (Setting::On, "\"on\""), (Setting::Strength(-0.5), "-0.5")]
        {
            assert_eq!(serde_json::to_string(&setting).unwrap(), written);
            assert_eq!(serde_json::from_str::<Setting>(written).unwrap(), setting);
        }
        for wrong in ["null", "true", "1e300", "\"loud\""] {
            assert!(serde_json::from_str::<Setting>(wrong).is_err(), "{wrong}");
        }
    }
}
