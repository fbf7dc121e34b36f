//! Prompt files as they are: lines of text, or records (`.jsonl`, `.json`, `.csv`) of which one field holds the prompt.

use anyhow::{Context, bail, ensure};
use pilotfish::engine::Prompt;
use pilotfish::learn::Classes;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Fields that hold the prompt in the usual files, in any case, the first that is there: `prompt` (XSTest and most others), `forbidden_prompt`
/// (StrongREJECT), `goal` (AdvBench and JailbreakBench, whose `Behavior` is only a name), `instruction` (Alpaca), `request` (PHTest),
/// `behavior` (HarmBench).
const FIELDS: [&str; 7] = ["prompt", "forbidden_prompt", "goal", "instruction", "request", "behavior", "question"];

/// Where it is there, how the answer begins.
const PREFILL: &str = "prefill";

/// A prompt's file, and which of its records: as `F`, `F[field=pattern]` or `F[field!=pattern]`.
struct Selected<'a> {
    path: &'a Path,
    filter: Option<Filter<'a>>,
}

/// Which records: those whose field is, or is not, like a pattern in which `*` stands for anything.
struct Filter<'a> {
    field: &'a str,
    equal: bool,
    pattern: &'a str,
}

/// A record of a file, with where it stands.
struct Record {
    place: String,
    fields: Vec<(String, String)>,
}

/// Reads prompts: `.txt`, one a line; `.jsonl` and `.csv` of records; `.json`, an array of records or texts. A filter behind the file's name
/// chooses among records: `xstest.csv[type=contrast_*]`. Where a record has the field `prefill`, the answer to its prompt has begun with that.
pub fn read(given: &Path) -> anyhow::Result<Vec<Prompt>> {
    Ok(read_records(given)?.into_iter().map(|record| record.prompt).collect())
}

/// A prompt with what else its record says.
pub struct PromptRecord {
    pub prompt: Prompt,
    record: Record,
}

impl PromptRecord {
    /// A field as it stands, with the space that it may begin with.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.record.get(name)
    }

    /// A field that the record has to have, and not empty.
    pub fn field(&self, name: &str) -> anyhow::Result<String> {
        let Record { place, .. } = &self.record;
        self.record
            .get(name)
            .and_then(filled)
            .with_context(|| format!("{place}: no field is called `{name}`, or it is empty"))
    }
}

/// As [`read`], with what else there is of each prompt.
pub fn read_records(given: &Path) -> anyhow::Result<Vec<PromptRecord>> {
    let Selected { path, filter } = selected(given);
    let text =
        std::fs::read_to_string(path).with_context(|| format!("can't read prompts from `{}`", path.display()))?;
    let prompts = prompts(path, &text, filter.as_ref()).with_context(|| format!("`{}`", given.display()))?;
    if prompts.is_empty() {
        bail!("`{}` holds no prompts", given.display());
    }
    Ok(prompts)
}

/// Prompts of one contrast: with a property, and without it.
pub struct Contrasted {
    positive: Vec<Prompt>,
    negative: Vec<Prompt>,
}

impl Contrasted {
    pub fn classes(&self) -> Classes<'_> {
        Classes { positive: &self.positive, negative: &self.negative }
    }
}

/// Reads `--positive` and `--negative`, of which there is one each for every contrast.
pub fn read_contrasts(positive: &[PathBuf], negative: &[PathBuf]) -> anyhow::Result<Vec<Contrasted>> {
    ensure!(
        positive.len() == negative.len(),
        "each `--positive` needs a `--negative` that it is compared with: there are {} and {}",
        positive.len(),
        negative.len()
    );
    let pair = |(p, n): (&PathBuf, &PathBuf)| Ok(Contrasted { positive: read(p)?, negative: read(n)? });
    positive.iter().zip(negative).map(pair).collect()
}

fn prompts(path: &Path, text: &str, filter: Option<&Filter<'_>>) -> anyhow::Result<Vec<PromptRecord>> {
    let records = match path.extension().and_then(|extension| extension.to_str()) {
        Some("jsonl") => jsonl(text)?,
        Some("json") => json(text)?,
        Some("csv") => csv(text)?,
        Some("txt") if filter.is_some() => bail!("a filter needs records: .jsonl, .json or .csv"),
        Some("txt") => lines(text),
        _ => bail!("prompts come as .jsonl, .json, .csv or .txt"),
    };
    let Some(first) = records.first() else { return Ok(Vec::new()) };
    let field = FIELDS.into_iter().find(|field| first.get(field).is_some()).with_context(|| {
        format!("{}: no field is called {}", first.place, FIELDS.map(|name| format!("`{name}`")).join(", "))
    })?;
    let mut prompts = Vec::new();
    for record in records {
        if record.is_chosen(filter)? {
            let prompt =
                record.get(field).with_context(|| format!("{}: no field is called `{field}`", record.place))?;
            if let Some(prompt) = filled(prompt).map(|prompt| record.with_context(field, prompt)) {
                // As it stands: spaces at its ends are the model's own.
                let prefill = record.get(PREFILL).unwrap_or_default().to_owned();
                prompts.push(PromptRecord { prompt: Prompt { text: prompt, prefill }, record });
            }
        }
    }
    Ok(prompts)
}

/// A filter is what stands in brackets at the end, unless there is a file of that very name.
fn selected(given: &Path) -> Selected<'_> {
    let parsed = || {
        let (path, inner) = given.to_str()?.strip_suffix(']')?.rsplit_once('[')?;
        let (field, pattern) = inner.split_once('=')?;
        let (field, equal) = field.strip_suffix('!').map_or((field, true), |field| (field, false));
        let filter = Filter { field: field.trim(), equal, pattern: pattern.trim() };
        Some(Selected { path: Path::new(path), filter: Some(filter) })
    };
    let plain = Selected { path: given, filter: None };
    if given.is_file() { plain } else { parsed().unwrap_or(plain) }
}

impl Record {
    fn get(&self, name: &str) -> Option<&str> {
        let known = self.fields.iter().find(|(field, _)| field.trim().eq_ignore_ascii_case(name));
        known.map(|(_, value)| value.as_str())
    }

    fn is_chosen(&self, filter: Option<&Filter<'_>>) -> anyhow::Result<bool> {
        let Some(Filter { field, equal, pattern }) = filter else { return Ok(true) };
        let known = || self.fields.iter().map(|(field, _)| format!("`{field}`")).collect::<Vec<_>>().join(", ");
        let value = self
            .get(field)
            .with_context(|| format!("{}: no field is called `{field}`; there are {}", self.place, known()))?;
        Ok(is_like(value.trim(), pattern) == *equal)
    }

    /// The prompt with what its data set says belongs to it: HarmBench puts a context before the behaviour, with a rule between them; Alpaca an
    /// input after the instruction.
    fn with_context(&self, field: &str, prompt: String) -> String {
        let other = |name| self.get(name).and_then(filled);
        match field {
            "behavior" => match other("contextstring") {
                Some(context) => format!("{context}\n\n---\n\n{prompt}"),
                None => prompt,
            },
            "instruction" => match other("input") {
                Some(input) => format!("{prompt}\n\n{input}"),
                None => prompt,
            },
            _ => prompt,
        }
    }
}

/// Text without what surrounds it, if there is any.
fn filled(text: &str) -> Option<String> {
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

/// Whether `text` is like `pattern`, in which `*` stands for anything.
fn is_like(text: &str, pattern: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('*') else { return text == pattern };
    let Some(text) = text.strip_prefix(head) else { return false };
    let starts = text.char_indices().map(|(at, _)| at).chain([text.len()]);
    starts.into_iter().any(|at| is_like(&text[at..], rest))
}

/// A record a line, of its prompt alone.
fn lines(text: &str) -> Vec<Record> {
    let record = |(index, line): (usize, &str)| {
        let prompt = filled(line)?;
        Some(Record { place: format!("line {}", index + 1), fields: vec![("prompt".to_owned(), prompt)] })
    };
    text.lines().enumerate().filter_map(record).collect()
}

fn jsonl(text: &str) -> anyhow::Result<Vec<Record>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let record = |(index, line): (usize, &str)| {
        let place = format!("line {}", index + 1);
        let value: Value = serde_json::from_str(line).with_context(|| place.clone())?;
        record(place, value)
    };
    lines.map(record).collect()
}

fn json(text: &str) -> anyhow::Result<Vec<Record>> {
    let values: Vec<Value> = serde_json::from_str(text).context("expected an array of records or texts")?;
    values.into_iter().enumerate().map(|(index, value)| record(format!("record {}", index + 1), value)).collect()
}

/// An object as it is, a text as a prompt.
fn record(place: String, value: Value) -> anyhow::Result<Record> {
    let plain = |value: Value| match value {
        Value::String(text) => text,
        Value::Null => String::new(),
        other => other.to_string(),
    };
    let fields = match value {
        Value::Object(fields) => fields.into_iter().map(|(name, value)| (name, plain(value))).collect(),
        Value::String(text) => vec![("prompt".to_owned(), text)],
        _ => bail!("{place}: expected a record or a text"),
    };
    Ok(Record { place, fields })
}

fn csv(text: &str) -> anyhow::Result<Vec<Record>> {
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let headers: Vec<String> = reader.headers()?.iter().map(str::to_owned).collect();
    reader
        .records()
        .map(|record| {
            let record = record?;
            let line = record.position().map_or(0, csv::Position::line);
            let fields = headers.iter().cloned().zip(record.iter().map(str::to_owned)).collect();
            Ok(Record { place: format!("line {line}"), fields })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(name: &str, text: &str) -> anyhow::Result<Vec<String>> {
        read_selected(name, "", text)
    }

    fn read_selected(name: &str, filter: &str, text: &str) -> anyhow::Result<Vec<String>> {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join(name), text).unwrap();
        let read = read(&directory.path().join(format!("{name}{filter}")))?;
        Ok(read.iter().map(Prompt::to_string).collect())
    }

    #[test]
    fn every_format_is_read() {
        let expected = ["How are you?", "Name, please"];
        for (name, text) in [
            ("a.jsonl", "{\"prompt\": \"How are you?\"}\n\n{\"kind\": 1, \"prompt\": \"Name, please\"}\n"),
            ("a.json", r#"["How are you?", "Name, please"]"#),
            (
                "b.json",
                r#"[{"Instruction": "How are you?", "input": "", "output": "x"}, {"instruction": "Name, please"}]"#,
            ),
            ("a.csv", "id,Goal\n1,How are you?\n2,\"Name, please\"\n"),
            ("b.csv", "PROMPT\nHow are you?\n\"Name, please\"\n"),
            ("a.txt", "How are you?\n\n  Name, please\n"),
        ] {
            assert_eq!(read_text(name, text).unwrap(), expected, "{name}");
        }
    }

    /// Headers and rows as the data sets have them, with texts of our own.
    #[test]
    fn data_sets_are_read_as_they_are() {
        for (name, text, expected) in [
            ("AdvBench", "goal,target\nSteal a boat,\"Sure, here is\"\n", "Steal a boat"),
            ("StrongREJECT", "category,source,forbidden_prompt\nTheft,custom,Steal a boat\n", "Steal a boat"),
            (
                "JailbreakBench",
                "Index,Goal,Target,Behavior,Category,Source\n0,Steal a boat,Sure,Boats,Theft,Original\n",
                "Steal a boat",
            ),
            (
                "HarmBench",
                "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\nSteal a boat,standard,illegal,,,boat\n",
                "Steal a boat",
            ),
            (
                "HarmBench, contextual",
                "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\nSteal it,contextual,illegal,context,A boat lies there.,b\n",
                "A boat lies there.\n\n---\n\nSteal it",
            ),
            ("XSTest", "id,prompt,type,label,focus,note\n1,Kill a process?,homonyms,safe,kill,\n", "Kill a process?"),
            ("PHTest", "ID,Request,Harmfulness\n0,Kill a process?,harmless\n", "Kill a process?"),
        ] {
            assert_eq!(read_text("a.csv", text).unwrap(), [expected], "{name}");
        }
        let alpaca = r#"[{"instruction": "Translate.", "input": "sea", "output": "mer"}]"#;
        assert_eq!(read_text("a.json", alpaca).unwrap(), ["Translate.\n\nsea"]);
    }

    #[test]
    fn an_answer_may_have_begun() {
        let lines = "{\"prompt\": \" a \", \"prefill\": \" It is \"}\n{\"prompt\": \"b\"}\n{\"prompt\": \"c\", \"prefill\": \"\"}\n";
        assert_eq!(read_text("x.jsonl", lines).unwrap(), ["a →  It is ", "b", "c"]);
        assert_eq!(read_text("x.csv", "prompt,response,prefill\na,no,Sure\n").unwrap(), ["a → Sure"]);
    }

    #[test]
    fn a_filter_chooses_records() {
        let text = "type,prompt\nhomonyms,a\ncontrast_homonyms,b\ndefinitions,c\ncontrast_definitions,d\n";
        for (filter, expected) in [
            ("[type=contrast_*]", &["b", "d"][..]),
            ("[type!=contrast_*]", &["a", "c"]),
            ("[Type = homonyms]", &["a"]),
            ("[type=*homonyms]", &["a", "b"]),
            ("[type=*]", &["a", "b", "c", "d"]),
        ] {
            assert_eq!(read_selected("x.csv", filter, text).unwrap(), expected, "{filter}");
        }
        let lines = "{\"harmful\": true, \"prompt\": \"a\"}\n{\"harmful\": false, \"prompt\": \"b\"}\n";
        assert_eq!(read_selected("x.jsonl", "[harmful=true]", lines).unwrap(), ["a"]);
        for (name, filter, says) in [
            ("x.csv", "[kind=a]", "no field is called `kind`; there are `type`, `prompt`"),
            ("x.csv", "[type=none]", "holds no prompts"),
            ("x.txt", "[type=a]", "a filter needs records"),
        ] {
            let error = format!("{:#}", read_selected(name, filter, text).unwrap_err());
            assert!(error.contains(says), "{filter}: {error}");
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (name, text, says) in [
            ("a.jsonl", "{\"prompt\": \"a\"}\n{\"text\": \"b\"}\n", "line 2"),
            ("a.json", "{\"prompt\": \"a\"}", "an array of records"),
            ("a.json", "[1]", "record 1: expected a record or a text"),
            ("a.csv", "id,text\n1,a\n", "no field is called `prompt`, `forbidden_prompt`, `goal`, `instruction`"),
            ("a.txt", "\n", "holds no prompts"),
            ("a.md", "a", "prompts come as .jsonl, .json, .csv or .txt"),
        ] {
            let error = format!("{:#}", read_text(name, text).unwrap_err());
            assert!(error.contains(says) && error.contains(name), "{name}: {error}");
        }
    }
}
