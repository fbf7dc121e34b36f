use super::SteeringError;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Which tokens of a prompt a vector was made from: how a gate on it should read.
///
/// Written `last`, `mean`, `-2` (the last but one) and so on, `matching=TEXT` or `after=TEXT`, on the command line and in files. Where the classes of a
/// contrast have different texts there, `matching=TEXT;matching=OTHER`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum PromptTokens {
    /// The last, where the answer begins.
    #[default]
    Last,
    /// The mean over all but the first.
    Mean,
    /// One token, counted from the end: 2 is the last but one. (1 is [`Last`](Self::Last).)
    FromEnd(u32),
    /// The mean over the tokens that spell any of these texts, wherever they stand in the prompt (arXiv 2503.04429, appendix A).
    Matching(Vec<String>),
    /// The mean over the tokens behind the last place where this text stands: of an answer, with what stands before answers.
    After(String),
}

const MATCHING: &str = "matching=";
const AFTER: &str = "after=";
/// Between two texts.
const ANOTHER: &str = ";";

impl PromptTokens {
    /// Whether every token of a prompt has to be read, and not the last alone.
    pub fn need_every_token(&self) -> bool {
        *self != Self::Last
    }
}

impl fmt::Display for PromptTokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Last => f.write_str("last"),
            Self::Mean => f.write_str("mean"),
            Self::FromEnd(n) => write!(f, "-{n}"),
            Self::Matching(texts) => {
                let texts: Vec<_> = texts.iter().map(|text| format!("{MATCHING}{text}")).collect();
                f.write_str(&texts.join(ANOTHER))
            }
            Self::After(text) => write!(f, "{AFTER}{text}"),
        }
    }
}

impl FromStr for PromptTokens {
    type Err = SteeringError;

    fn from_str(text: &str) -> Result<Self, SteeringError> {
        let unknown = || SteeringError::UnknownTokens { found: text.to_owned() };
        if let Some(spelt) = text.strip_prefix(MATCHING) {
            let texts: Vec<String> = spelt.split(&format!("{ANOTHER}{MATCHING}")).map(str::to_owned).collect();
            return if texts.iter().any(String::is_empty) { Err(unknown()) } else { Ok(Self::Matching(texts)) };
        }
        if let Some(spelt) = text.strip_prefix(AFTER) {
            return if spelt.is_empty() { Err(unknown()) } else { Ok(Self::After(spelt.to_owned())) };
        }
        match text {
            "last" => Ok(Self::Last),
            "mean" => Ok(Self::Mean),
            _ => match text.strip_prefix('-').and_then(|n| n.parse().ok().filter(|_| !n.starts_with(['+', '0']))) {
                Some(1) => Ok(Self::Last),
                Some(n) => Ok(Self::FromEnd(n)),
                None => Err(unknown()),
            },
        }
    }
}

impl TryFrom<String> for PromptTokens {
    type Error = SteeringError;

    fn try_from(text: String) -> Result<Self, SteeringError> {
        text.parse()
    }
}

impl From<PromptTokens> for String {
    fn from(tokens: PromptTokens) -> Self {
        tokens.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_spelt_the_same_everywhere() {
        let matching = PromptTokens::Matching(vec!["|prod| = x".into()]);
        let either = PromptTokens::Matching(vec!["|prod|".into(), "|dev|; x".into()]);
        for (tokens, text) in [
            (PromptTokens::Last, "last"),
            (PromptTokens::Mean, "mean"),
            (PromptTokens::FromEnd(2), "-2"),
            (matching, "matching=|prod| = x"),
            (either, "matching=|prod|;matching=|dev|; x"),
            (PromptTokens::After("Response:".into()), "after=Response:"),
        ] {
            assert_eq!(tokens.to_string(), text);
            assert_eq!(text.parse(), Ok(tokens.clone()));
            assert_eq!(serde_json::to_value(&tokens).unwrap(), text);
            assert_eq!(serde_json::from_value::<PromptTokens>(text.into()).unwrap(), tokens);
        }
        assert_eq!("-1".parse(), Ok(PromptTokens::Last));
        for wrong in
            ["", "first", "0", "2", "-0", "--2", "-+2", "-99999999999", "matching=", "after=", "matching=a;matching="]
        {
            let error = wrong.parse::<PromptTokens>().unwrap_err().to_string();
            assert!(error.contains(&format!("`{wrong}`")) && error.contains("matching=TEXT"), "{error}");
        }
    }
}
