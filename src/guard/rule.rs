//! When an intervention acts: a boolean expression over gates, as `harmful and not research`.

use super::GuardError;
use super::error::shown;
use std::fmt::Write;

/// A boolean expression over the gates of a guard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rule {
    /// Index into [`Guard::gates`](super::Guard::gates).
    Gate(usize),
    Not(Box<Rule>),
    And(Box<Rule>, Box<Rule>),
    Or(Box<Rule>, Box<Rule>),
}

/// What is known of a gate or of a rule, in Kleene's three values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Truth {
    False,
    Unknown,
    True,
}

/// Words that rules are written with, which no gate may have for a name.
pub(super) const RESERVED: [&str; 3] = ["and", "or", "not"];
/// Gates, operators and brackets that a rule may have. It bounds how deep a rule nests too.
const MAX_WORDS: usize = 256;

impl Rule {
    /// Reads `text`: names of gates, `not`, `and`, `or` (binding in this order, strongest first) and brackets. `gate` gives the index of a
    /// gate by its name.
    ///
    /// # Errors
    /// A name that `gate` refuses, or anything that is no such expression; the error says at which word.
    pub(super) fn parse(text: &str, gate: impl Fn(&str) -> Result<usize, GuardError>) -> Result<Self, GuardError> {
        let words = words(text);
        if words.len() > MAX_WORDS {
            return Err(GuardError::value(format!("a rule of at most {MAX_WORDS} words"), format!("{}", words.len())));
        }
        let mut parser = Parser { words: &words, next: 0, gate };
        let rule = parser.any()?;
        match parser.words.get(parser.next) {
            None => Ok(rule),
            Some(word) => Err(parser.unexpected("`and`, `or` or the rule's end", Some(word))),
        }
    }

    /// What the rule says where `gate` tells each gate.
    pub fn eval(&self, gate: &impl Fn(usize) -> Truth) -> Truth {
        match self {
            Self::Gate(index) => gate(*index),
            Self::Not(rule) => rule.eval(gate).not(),
            Self::And(a, b) => a.eval(gate).and(b.eval(gate)),
            Self::Or(a, b) => a.eval(gate).not().and(b.eval(gate).not()).not(),
        }
    }

    /// Indices of the gates that the rule asks, each as often as it is named.
    pub fn gates(&self) -> Vec<usize> {
        match self {
            Self::Gate(index) => vec![*index],
            Self::Not(rule) => rule.gates(),
            Self::And(a, b) | Self::Or(a, b) => [a.gates(), b.gates()].concat(),
        }
    }

    /// The same rule with every index `i` as `i + by`: for gates in a longer list.
    pub(crate) fn shifted(&self, by: usize) -> Self {
        let shift = |rule: &Self| Box::new(rule.shifted(by));
        match self {
            Self::Gate(index) => Self::Gate(index + by),
            Self::Not(rule) => Self::Not(shift(rule)),
            Self::And(a, b) => Self::And(shift(a), shift(b)),
            Self::Or(a, b) => Self::Or(shift(a), shift(b)),
        }
    }

    /// The rule as it would be written, with the names of its gates.
    pub fn with_names<'n>(&self, name: &impl Fn(usize) -> &'n str) -> String {
        fn put<'n>(rule: &Rule, inside: u8, name: &impl Fn(usize) -> &'n str, out: &mut String) {
            let (own, operator) = match rule {
                Rule::Or(..) => (0, " or "),
                Rule::And(..) => (1, " and "),
                Rule::Not(_) => (2, "not "),
                Rule::Gate(_) => (3, ""),
            };
            let bracket = own < inside;
            out.push_str(if bracket { "(" } else { "" });
            match rule {
                Rule::Gate(index) => write!(out, "{}", name(*index)).expect("a string takes any text"),
                Rule::Not(rule) => {
                    out.push_str(operator);
                    put(rule, own, name, out);
                }
                Rule::And(a, b) | Rule::Or(a, b) => {
                    put(a, own, name, out);
                    out.push_str(operator);
                    put(b, own, name, out);
                }
            }
            out.push_str(if bracket { ")" } else { "" });
        }
        let mut out = String::new();
        put(self, 0, name, &mut out);
        out
    }
}

impl Truth {
    fn not(self) -> Self {
        match self {
            Self::False => Self::True,
            Self::Unknown => Self::Unknown,
            Self::True => Self::False,
        }
    }

    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::False, _) | (_, Self::False) => Self::False,
            (Self::True, Self::True) => Self::True,
            _ => Self::Unknown,
        }
    }
}

impl From<bool> for Truth {
    fn from(value: bool) -> Self {
        if value { Self::True } else { Self::False }
    }
}

fn words(text: &str) -> Vec<&str> {
    let mut words = Vec::new();
    for part in text.split_whitespace() {
        let mut rest = part;
        while let Some(at) = rest.find(['(', ')']) {
            if at > 0 {
                words.push(&rest[..at]);
            }
            words.push(&rest[at..=at]);
            rest = &rest[at + 1..];
        }
        if !rest.is_empty() {
            words.push(rest);
        }
    }
    words
}

struct Parser<'a, G> {
    words: &'a [&'a str],
    next: usize,
    gate: G,
}

impl<G: Fn(&str) -> Result<usize, GuardError>> Parser<'_, G> {
    fn any(&mut self) -> Result<Rule, GuardError> {
        let mut rule = self.all()?;
        while self.take("or") {
            rule = Rule::Or(Box::new(rule), Box::new(self.all()?));
        }
        Ok(rule)
    }

    fn all(&mut self) -> Result<Rule, GuardError> {
        let mut rule = self.one()?;
        while self.take("and") {
            rule = Rule::And(Box::new(rule), Box::new(self.one()?));
        }
        Ok(rule)
    }

    fn one(&mut self) -> Result<Rule, GuardError> {
        if self.take("not") {
            return Ok(Rule::Not(Box::new(self.one()?)));
        }
        if self.take("(") {
            let rule = self.any()?;
            return if self.take(")") { Ok(rule) } else { Err(self.unexpected("`)`", self.words.get(self.next))) };
        }
        match self.words.get(self.next).copied() {
            Some(name) if name != ")" && !RESERVED.contains(&name) => {
                self.next += 1;
                (self.gate)(name).map(Rule::Gate)
            }
            other => Err(self.unexpected("a gate, `not` or `(`", other.as_ref())),
        }
    }

    fn take(&mut self, word: &str) -> bool {
        let there = self.words.get(self.next) == Some(&word);
        self.next += usize::from(there);
        there
    }

    fn unexpected(&self, expected: &str, found: Option<&&str>) -> GuardError {
        let found = found.map_or("the rule's end".to_owned(), |word| format!("`{}`", shown(word)));
        GuardError::value(format!("{expected} as word {}", self.next + 1), found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NAMES: [&str; 3] = ["a", "b", "c"];

    fn read(text: &str) -> Result<Rule, GuardError> {
        let known = |name: &str| {
            NAMES
                .iter()
                .position(|known| *known == name)
                .ok_or_else(|| GuardError::unknown("gate", name, NAMES.map(String::from).iter()))
        };
        Rule::parse(text, known)
    }

    fn name(index: usize) -> &'static str {
        NAMES[index]
    }

    #[test]
    fn not_binds_stronger_than_and_and_and_than_or() {
        for (text, plain) in [
            ("a", "a"),
            ("a or b and c", "a or (b and c)"),
            ("not a and b", "(not a) and b"),
            ("not(a or b)and c", "(not (a or b)) and c"),
            ("not not a", "not (not a)"),
            ("a or b or c", "(a or b) or c"),
        ] {
            assert_eq!(read(text).unwrap(), read(plain).unwrap(), "{text}");
        }
    }

    #[test]
    fn what_is_no_rule_is_an_error_that_says_where() {
        for (text, says) in [
            ("", "word 1"),
            ("a and", "word 3"),
            ("a b", "word 2"),
            ("(a", "word 3"),
            ("a)", "word 2"),
            ("and", "word 1"),
            ("not", "word 2"),
            ("()", "word 2"),
            ("a and shark", "shark"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
        assert!(read(&"not ".repeat(100_000)).is_err());
        assert!(read(&"(".repeat(100_000)).is_err());
    }

    fn rule() -> impl Strategy<Value = Rule> {
        (0usize..3).prop_map(Rule::Gate).prop_recursive(4, 16, 2, |inner| {
            prop_oneof![
                inner.clone().prop_map(|rule| Rule::Not(Box::new(rule))),
                (inner.clone(), inner.clone()).prop_map(|(a, b)| Rule::And(Box::new(a), Box::new(b))),
                (inner.clone(), inner).prop_map(|(a, b)| Rule::Or(Box::new(a), Box::new(b))),
            ]
        })
    }

    fn plainly(rule: &Rule, gates: [bool; 3]) -> bool {
        match rule {
            Rule::Gate(index) => gates[*index],
            Rule::Not(rule) => !plainly(rule, gates),
            Rule::And(a, b) => plainly(a, gates) && plainly(b, gates),
            Rule::Or(a, b) => plainly(a, gates) || plainly(b, gates),
        }
    }

    proptest! {
        #[test]
        fn a_rule_reads_as_it_is_written(rule in rule(), gates in any::<[bool; 3]>()) {
            let again = read(&rule.with_names(&name)).unwrap();
            // Chains of one operator may be bracketed another way, which means the same.
            prop_assert_eq!(again.eval(&|gate| gates[gate].into()), Truth::from(plainly(&rule, gates)));
        }

        #[test]
        fn an_unknown_gate_is_decided_only_where_both_its_values_agree(rule in rule(), gates in any::<[bool; 3]>(), unknown in 0usize..3) {
            let found = rule.eval(&|gate| if gate == unknown { Truth::Unknown } else { gates[gate].into() });
            let with = |value| { let mut gates = gates; gates[unknown] = value; plainly(&rule, gates) };
            if found != Truth::Unknown {
                prop_assert_eq!(found, Truth::from(with(true)));
                prop_assert_eq!(found, Truth::from(with(false)));
            }
        }
    }
}
