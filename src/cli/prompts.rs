use anyhow::{Context, bail, ensure};
use pilotfish::learn::Classes;
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// Column names that hold the prompt in the usual CSV files, in any case.
const COLUMNS: [&str; 3] = ["prompt", "goal", "instruction"];

/// Reads prompts: `.jsonl` with `prompt`, `.csv` with a `prompt`, `goal` or `instruction` column, or `.txt`, one a line.
pub fn read(path: &Path) -> anyhow::Result<Vec<String>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("can't read prompts from `{}`", path.display()))?;
    let prompts = match path.extension().and_then(|extension| extension.to_str()) {
        Some("jsonl") => jsonl(&text),
        Some("csv") => csv(&text),
        Some("txt") => Ok(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect()),
        _ => bail!("`{}`: prompts come as .jsonl, .csv or .txt", path.display()),
    }
    .with_context(|| format!("`{}`", path.display()))?;
    if prompts.is_empty() {
        bail!("`{}` holds no prompts", path.display());
    }
    Ok(prompts)
}

/// Prompts of one contrast: with a property, and without it.
pub struct Contrasted {
    positive: Vec<String>,
    negative: Vec<String>,
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

fn jsonl(text: &str) -> anyhow::Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Line {
        prompt: String,
    }
    text.lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(index, line)| {
            let line: Line = serde_json::from_str(line).with_context(|| format!("line {}", index + 1))?;
            Ok(line.prompt)
        })
        .collect()
}

fn csv(text: &str) -> anyhow::Result<Vec<String>> {
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let headers = reader.headers()?;
    let column = COLUMNS
        .iter()
        .find_map(|wanted| headers.iter().position(|header| header.trim().eq_ignore_ascii_case(wanted)))
        .with_context(|| format!("no column is called {}", COLUMNS.map(|name| format!("`{name}`")).join(", ")))?;
    reader
        .records()
        .map(|record| Ok(record?.get(column).unwrap_or_default().to_owned()))
        .filter(|prompt: &anyhow::Result<String>| prompt.as_ref().map_or(true, |prompt| !prompt.trim().is_empty()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(name: &str, text: &str) -> anyhow::Result<Vec<String>> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        read(&path)
    }

    #[test]
    fn every_format_is_read() {
        let expected = ["How are you?", "Name, please"];
        for (name, text) in [
            ("a.jsonl", "{\"prompt\": \"How are you?\"}\n\n{\"kind\": 1, \"prompt\": \"Name, please\"}\n"),
            ("a.csv", "id,Goal\n1,How are you?\n2,\"Name, please\"\n"),
            ("b.csv", "PROMPT\nHow are you?\n\"Name, please\"\n"),
            ("a.txt", "How are you?\n\n  Name, please\n"),
        ] {
            assert_eq!(read_text(name, text).unwrap(), expected, "{name}");
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (name, text, says) in [
            ("a.jsonl", "{\"prompt\": \"a\"}\n{\"text\": \"b\"}\n", "line 2"),
            ("a.csv", "id,text\n1,a\n", "no column is called `prompt`, `goal`, `instruction`"),
            ("a.txt", "\n", "holds no prompts"),
            ("a.md", "a", "prompts come as .jsonl, .csv or .txt"),
        ] {
            let error = format!("{:#}", read_text(name, text).unwrap_err());
            assert!(error.contains(says) && error.contains(name), "{name}: {error}");
        }
    }
}
