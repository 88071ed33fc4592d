//! The command that goes on with a run: the one that began it, word by word from the parsed arguments, quoted for a shell.

use super::args::Args;
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command, CommandFactory};
use std::ffi::OsString;

/// Arguments that a repeated command does without.
const IRRELEVANT: [&str; 2] = ["help", "version"];

/// What goes on with a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Again {
    /// Ready to be pasted into a shell.
    pub command: String,
    /// The options in it that compute stages although they are in the cache.
    pub repeats: Vec<String>,
}

/// Returns the command that repeats this one. Every argument that was given on the command line is in it, whatever arguments there
/// are; what came from the environment comes from there again. `run_id` is the run that `rerun` repeats: "the latest" is another
/// one by now.
pub fn again(words: impl IntoIterator<Item = OsString>, run_id: Option<&str>) -> Again {
    let fallback = |words: &[OsString]| {
        let quoted: Vec<String> = words.iter().skip(1).map(|word| shell_word(&word.to_string_lossy())).collect();
        Again { command: format!("labpipe {}", quoted.join(" ")), repeats: Vec::new() }
    };
    let words: Vec<OsString> = words.into_iter().collect();
    let mut root = Args::command();
    // They were parsed when the program began.
    let Ok(matches) = root.try_get_matches_from_mut(&words) else { return fallback(&words) };
    let Some((name, matches)) = matches.subcommand() else { return fallback(&words) };
    let Some(command) = root.find_subcommand(name) else { return fallback(&words) };
    let mut found = Again { command: format!("labpipe {name}"), repeats: Vec::new() };
    let (positionals, options): (Vec<&Arg>, Vec<&Arg>) =
        arguments(command, &root).into_iter().partition(|arg| arg.is_positional());
    for arg in positionals.into_iter().chain(options) {
        let words: Vec<String> = words_of(arg, matches).iter().map(|word| shell_word(word)).collect();
        if words.is_empty() {
            continue;
        }
        found.command.push_str(&format!(" {}", words.join(" ")));
        if ["force", "remeasure", "from"].contains(&arg.get_id().as_str()) {
            found.repeats.push(words.join(" "));
        }
    }
    let is_named = matches.try_contains_id("run").is_ok_and(|is_there| is_there);
    if let Some(run_id) = run_id.filter(|_| !is_named) {
        found.command.push_str(&format!(" --run {}", shell_word(run_id)));
    }
    found
}

/// Returns the arguments of a subcommand, those of the whole program among them.
fn arguments<'a>(command: &'a Command, root: &'a Command) -> Vec<&'a Arg> {
    let global = root.get_arguments().filter(|arg| arg.is_global_set());
    let own = command.get_arguments().filter(|arg| !arg.is_global_set());
    global.chain(own).filter(|arg| !IRRELEVANT.contains(&arg.get_id().as_str())).collect()
}

/// Returns an argument as it would be written, once per time that it was given.
fn words_of(arg: &Arg, matches: &ArgMatches) -> Vec<String> {
    let id = arg.get_id().as_str();
    if matches.value_source(id) != Some(ValueSource::CommandLine) {
        return Vec::new();
    }
    let name = arg.get_long().map(|long| format!("--{long}"));
    let takes_values = arg.get_action().takes_values();
    let occurrences = matches.get_raw_occurrences(id).into_iter().flatten();
    let values = occurrences.map(|values| values.map(|value| value.to_string_lossy().into_owned()).collect::<Vec<_>>());
    match name {
        Some(name) if !takes_values => vec![name],
        Some(name) => values
            .flat_map(|values| match values.join(",") {
                value if value.is_empty() && arg.is_require_equals_set() => vec![name.clone()],
                // A value that begins with a dash would be taken for an option.
                value if arg.is_require_equals_set() || value.starts_with('-') => vec![format!("{name}={value}")],
                value => vec![name.clone(), value],
            })
            .collect(),
        None => values.flatten().collect(),
    }
}

/// Quotes a word for a POSIX shell where it needs that.
fn shell_word(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &[&str]) -> Vec<OsString> {
        std::iter::once("labpipe").chain(text.iter().copied()).map(OsString::from).collect()
    }

    #[test]
    fn the_command_has_what_was_asked_for_quoted_for_a_shell() {
        let asked = [
            "--cache",
            "/a b",
            "run",
            "p.yaml",
            "--set",
            "title=it's",
            "--remeasure",
            "--jobs",
            "3",
            "--until=diff",
            "--set=n=[1, 2]",
            "-q",
        ];
        let found = again(words(&asked), None);
        assert_eq!(
            found.command,
            r"labpipe run p.yaml --cache '/a b' --quiet --set 'title=it'\''s' --set 'n=[1, 2]' --until diff --remeasure --jobs 3"
        );
        assert_eq!(found.repeats, ["--remeasure"]);
        let found = again(words(&["rerun", "--from", "diff"]), Some("20260101T000000Z-abcd"));
        assert_eq!(found.command, "labpipe rerun --from diff --run 20260101T000000Z-abcd");
        let found = again(words(&["rerun", "--from", "diff", "--run", "r1"]), Some("r1"));
        assert_eq!(found.command, "labpipe rerun --from diff --run r1");
    }

    /// A value that an argument takes; a flag has none.
    fn sample(id: &str) -> Option<&'static str> {
        match id {
            "file" => Some("a file.yaml"),
            "root" | "cache" | "results" => Some("/some folder"),
            "log_format" => Some("json"),
            "set" | "matrix" => Some("name=$value"),
            "device" => Some("cpu"),
            "execution" => Some("burn"),
            "only" | "until" | "from" | "remeasure" => Some("stage[config=int8]"),
            "jobs" => Some("7"),
            "memory_limit" => Some("7.5GiB"),
            "run" => Some("20260101T000000Z-abcd"),
            "verbose" | "quiet" | "force" | "rebuild_upstream" | "accept_disturbed" => None,
            other => panic!("{other} is a new argument: give a sample here, and see that the command repeats it"),
        }
    }

    #[test]
    fn every_argument_of_run_and_rerun_is_repeated_and_means_the_same() {
        let root = Args::command();
        for name in ["run", "rerun"] {
            let command = root.find_subcommand(name).expect("a subcommand");
            let needed: Vec<String> =
                if name == "run" { vec!["p.yaml".to_owned()] } else { vec!["--from=first".to_owned()] };
            for arg in arguments(command, &root) {
                let id = arg.get_id().as_str();
                let word = match (arg.get_long(), sample(id)) {
                    (Some(long), Some(value)) => format!("--{long}={value}"),
                    (Some(long), None) => format!("--{long}"),
                    (None, Some(value)) => value.to_owned(),
                    (None, None) => panic!("{id} has neither name nor value"),
                };
                let mut asked = vec![name.to_owned(), word.clone()];
                if !arg.is_positional() {
                    asked.extend(needed.clone());
                }
                let asked: Vec<&str> = asked.iter().map(String::as_str).collect();
                let found = again(words(&asked), None).command;
                let named = arg.get_long().map_or_else(|| shell_word(&word), |long| format!("--{long}"));
                assert!(found.contains(&named), "{id}: {found}");
                // A shell reads it as the same words.
                let shell = std::process::Command::new("sh").args(["-c", &format!("printf '%s\\0' {found}")]).output();
                let read = String::from_utf8(shell.expect("a shell").stdout).expect("text");
                let read: Vec<OsString> = read.split_terminator('\0').map(OsString::from).collect();
                let parsed = |words: Vec<OsString>| {
                    format!("{:?}", <Args as clap::Parser>::try_parse_from(words).expect("parsed"))
                };
                assert_eq!(parsed(read), parsed(words(&asked)), "{id}: {found}");
            }
        }
    }
}
