//! The house in order: what the repository offers to users parses, is documented and is used, the workflows run only
//! what the justfile has, and rooms import downward only.

use labpipe::quantization;
use labpipe::stage::{Catalogue, ParamType};
use labpipe::{pipeline, stages};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("read {}: {error}", path.display()))
}

/// Returns the files of a folder with that ending, sorted, relative to the root.
fn files(folder: &str, ending: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(root().join(folder)).unwrap_or_else(|error| panic!("list {folder}: {error}"));
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| Path::new(folder).join(entry.expect("a folder's entry is readable").file_name()))
        .filter(|path| path.to_string_lossy().ends_with(ending))
        .collect();
    paths.sort();
    assert!(!paths.is_empty(), "{folder} holds no {ending} file");
    paths
}

/// Returns every `.rs` file below a folder.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("list {}: {error}", folder.display())) {
        let path = entry.expect("a folder's entry is readable").path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}

fn parse_yaml(path: &Path) -> Value {
    labpipe::yaml::parse(&read(path)).unwrap_or_else(|error| panic!("{}: {error}", path.display())).to_json()
}

fn parse_pipeline(path: &Path, catalogue: &Catalogue) -> pipeline::Pipeline {
    let origin = path.display().to_string();
    pipeline::parse(&read(path), &origin, catalogue, &pipeline::ParseOptions::default())
        .unwrap_or_else(|error| panic!("{}", error.render()))
}

/// Calls `visit` with every text that stands under the key `name`, however deep.
fn visit_key(value: &Value, name: &str, visit: &mut dyn FnMut(&str)) {
    match value {
        Value::Object(fields) => {
            for (key, field) in fields {
                match field {
                    Value::String(text) if key == name => visit(text),
                    _ => visit_key(field, name, visit),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| visit_key(item, name, visit)),
        _ => {}
    }
}

#[test]
fn every_pipeline_parses_with_the_real_catalogue() {
    let catalogue = stages::catalogue();
    for path in files("pipelines", ".yaml") {
        let parsed = parse_pipeline(&path, &catalogue);
        assert!(!parsed.stages.is_empty(), "{} has no stages", path.display());
        let stem = path.file_stem().expect("a listed file has a name").to_string_lossy();
        // Names of pipelines have no dots.
        assert_eq!(parsed.name, stem.replace('.', "-"), "{}: a pipeline is named like its file", path.display());
        for dependency in parsed.stages.iter().flat_map(|stage| stage.inputs.values().flatten()) {
            assert!(
                parsed.stages.iter().any(|stage| &stage.address == dependency),
                "{}: {dependency} is no stage",
                path.display()
            );
        }
    }
}

/// Returns where a value does not fit a JSON Schema; knows the words that labpipe's own schema uses.
fn misfits(value: &Value, schema: &Value, at: &str) -> Vec<String> {
    let Some(words) = schema.as_object() else { panic!("{at}: a schema is a mapping") };
    let mut found = Vec::new();
    let mut check = |fits: bool, what: &str| {
        if !fits {
            found.push(format!("{at}: {what}, found {value}"));
        }
    };
    for (word, wanted) in words {
        let fitting = || {
            let schemas = wanted.as_array().expect("a list of schemas");
            schemas.iter().filter(|schema| misfits(value, schema, at).is_empty()).count()
        };
        let size = |count: usize| count as u64 >= wanted.as_u64().expect("a size");
        let list = |wanted: &Value| wanted.as_array().cloned().unwrap_or_else(|| vec![wanted.clone()]);
        match word.as_str() {
            "$schema" | "title" | "description" | "default" | "additionalProperties" | "propertyNames" => {}
            "const" => check(value == wanted, &format!("expected {wanted}")),
            "enum" => check(list(wanted).contains(value), &format!("expected one of {wanted}")),
            "anyOf" => check(fitting() > 0, "fits none of the alternatives"),
            "oneOf" => check(fitting() == 1, "does not fit exactly one of the alternatives"),
            "minimum" => check(value.as_f64() >= wanted.as_f64(), "is too small"),
            "maximum" => check(value.as_f64() <= wanted.as_f64(), "is too large"),
            "minLength" => check(size(value.as_str().map_or(0, str::len)), "is too short"),
            "minItems" => check(size(value.as_array().map_or(0, Vec::len)), "is too short"),
            "minProperties" => check(size(value.as_object().map_or(0, serde_json::Map::len)), "is too small"),
            // The only pattern that decides between alternatives is that of a variable.
            "pattern" if wanted.as_str().is_some_and(|pattern| pattern.contains("[^}]+")) => {
                check(value.as_str().is_some_and(|text| text.contains("${") && text.contains('}')), "is no variable");
            }
            "pattern" => {}
            "type" => {
                let is = |name: &Value| match name.as_str() {
                    Some("object") => value.is_object(),
                    Some("array") => value.is_array(),
                    Some("string") => value.is_string(),
                    Some("boolean") => value.is_boolean(),
                    Some("integer") => value.is_i64() || value.is_u64(),
                    Some("number") => value.is_number(),
                    other => panic!("{at}: type {other:?}"),
                };
                check(list(wanted).iter().any(is), &format!("expected {wanted}"));
            }
            "required" => {
                let names = list(wanted);
                let has = |name: &Value| value.get(name.as_str().unwrap_or_default()).is_some();
                check(names.iter().all(has), &format!("needs {wanted}"));
            }
            "items" => {
                for (idx, item) in value.as_array().into_iter().flatten().enumerate() {
                    check(misfits(item, wanted, at).is_empty(), &format!("item {idx} does not fit"));
                }
            }
            "properties" => {
                for (name, field) in value.as_object().into_iter().flatten() {
                    match (wanted.get(name), words.get("additionalProperties")) {
                        (Some(schema), _) => {
                            check(misfits(field, schema, at).is_empty(), &format!("{name} does not fit"))
                        }
                        (None, Some(Value::Bool(false))) => check(false, &format!("knows no {name}")),
                        (None, _) => {}
                    }
                }
            }
            other => panic!("{at}: the test knows no {other}"),
        }
    }
    if let Some(schema @ Value::Object(_)) = words.get("additionalProperties") {
        for (name, field) in value.as_object().into_iter().flatten() {
            found.extend(misfits(field, schema, &format!("{at}.{name}")));
        }
    }
    found
}

#[test]
fn every_pipeline_fits_the_schema_that_editors_are_given() {
    let schema = pipeline::schema(&stages::catalogue());
    for path in files("pipelines", ".yaml") {
        assert_eq!(misfits(&parse_yaml(&path), &schema, &path.display().to_string()), Vec::<String>::new());
    }
    let bad: Value = labpipe::yaml::parse("version: 1\nname: x\nstages: { a: { kind: load, modell: m } }\n")
        .expect("YAML")
        .to_json();
    assert_eq!(misfits(&bad, &schema, "bad").len(), 1);
}

#[test]
fn files_that_pipelines_name_are_there() {
    for path in files("pipelines", ".yaml") {
        for line in read(&path).lines().map(|line| line.split(" #").next().unwrap_or_default()) {
            for word in line.split(|c: char| c.is_whitespace() || "[]{},\"'".contains(c)) {
                if word.starts_with("experiments/") || word.starts_with("models/") {
                    let is_comment = line.trim_start().starts_with('#');
                    assert!(is_comment || root().join(word).exists(), "{} names {word}", path.display());
                }
            }
        }
    }
}

#[test]
fn every_config_parses_and_is_swept() {
    let swept = read("pipelines/sweep.yaml");
    for path in files("experiments", ".yaml") {
        let stem = path.file_stem().expect("a listed file has a name").to_string_lossy();
        let config = quantization::parse(&read(&path), &path.display().to_string(), &stem)
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert_eq!(config.name, stem, "{}: a config is named like its file", path.display());
        assert!(swept.contains(&format!("- {}", path.display())), "pipelines/sweep.yaml leaves out {}", path.display());
        assert!(read("experiments/README.md").contains(&format!("({stem}.yaml)")), "experiments/README.md: {stem}");
    }
}

#[test]
fn every_kind_of_stage_is_documented_and_used() {
    let catalogue = stages::catalogue();
    let used: BTreeSet<String> = files("pipelines", ".yaml")
        .iter()
        .flat_map(|path| parse_pipeline(path, &catalogue).stages)
        .map(|stage| stage.kind)
        .collect();
    let readme = read("README.md");
    let reference = read("docs/stages.md");
    for stage in catalogue.iter() {
        let description = stage.description();
        let kind = description.kind;
        assert!(used.contains(kind), "no file in pipelines/ uses {kind}");
        assert!(readme.contains(&format!("`{kind}`")), "README.md does not name {kind}");
        let section = section_of(&reference, kind);
        for param in description.params {
            let row = section
                .lines()
                .find(|line| line.starts_with(&format!("| `{}` |", param.name)))
                .unwrap_or_else(|| panic!("docs/stages.md: {kind} lacks parameter {}", param.name));
            if let ParamType::OneOf(words) | ParamType::SomeOf(words) = &param.ty {
                for word in *words {
                    assert!(row.contains(&format!("`{word}`")), "docs/stages.md: {kind}.{} lacks {word}", param.name);
                }
            }
        }
        let documented =
            section.lines().filter(|line| line.starts_with("| `")).filter_map(|line| line.split('`').nth(1));
        let n_params = description.params.len();
        let params: Vec<&str> = documented.take(n_params).collect();
        for name in params {
            assert!(description.param(name).is_some(), "docs/stages.md: {kind} has no parameter {name}");
        }
    }
}

/// Returns the part of a page under the heading `## kind`.
fn section_of<'a>(page: &'a str, kind: &str) -> &'a str {
    let heading = format!("\n## {kind}\n");
    let start = page.find(&heading).unwrap_or_else(|| panic!("docs/stages.md has no section {kind}")) + heading.len();
    let rest = &page[start..];
    &rest[..rest.find("\n## ").unwrap_or(rest.len())]
}

#[test]
fn every_report_format_is_used() {
    let catalogue = stages::catalogue();
    let report = catalogue.get("report").expect("there is a report stage");
    let formats = report.description().param("formats").expect("a report has formats");
    let ParamType::SomeOf(words) = &formats.ty else { panic!("formats is a list of words") };
    let mut used = BTreeSet::new();
    for path in files("pipelines", ".yaml") {
        for stage in parse_pipeline(&path, &catalogue).stages.iter().filter(|stage| stage.kind == "report") {
            let formats = stage.params.get("formats").and_then(Value::as_array).cloned().unwrap_or_default();
            used.extend(formats.iter().filter_map(Value::as_str).map(str::to_owned));
        }
    }
    for word in *words {
        assert!(used.contains(*word), "no pipeline asks for a report as {word}");
    }
}

#[test]
fn every_scheme_is_documented_and_used() {
    let mut used = BTreeSet::new();
    for path in files("experiments", ".yaml") {
        let stem = path.file_stem().expect("a listed file has a name").to_string_lossy();
        let config = quantization::parse(&read(&path), &path.display().to_string(), &stem).expect("it parses");
        let overridden = config.overrides.iter().filter_map(|item| item.scheme.as_ref());
        used.extend(config.scheme.iter().chain(overridden).map(|spec| spec.scheme.clone()));
    }
    for scheme in labpipe_kernels::SCHEMES {
        let name = scheme.name();
        assert!(used.contains(name), "no file in experiments/ uses {name}");
        for page in ["docs/schemes.md", "experiments/README.md"] {
            assert!(read(page).contains(&format!("`{name}`")), "{page} does not name {name}");
        }
    }
}

#[cfg(feature = "cpu")]
#[test]
fn every_model_family_is_named_in_the_readme() {
    let readme = read("README.md").to_lowercase();
    for family in labpipe::engine::FAMILIES {
        assert!(readme.contains(family.model_type), "README.md does not name {}", family.model_type);
    }
}

#[test]
fn workflows_run_recipes_of_the_justfile_and_nothing_else() {
    let justfile = read("justfile");
    // A recipe's name, and the script that its body calls.
    let mut recipes: BTreeMap<&str, &str> = BTreeMap::new();
    let mut name = "";
    for line in justfile.lines() {
        if let Some(body) = line.strip_prefix("    ") {
            recipes.entry(name).or_insert(body.split_whitespace().next().unwrap_or_default());
        } else if let Some((head, _)) = line.split_once(':').filter(|_| !line.starts_with('#')) {
            name = head.split_whitespace().next().unwrap_or_default();
        }
    }
    let ci = read(".ci/run");
    for path in files(".github/workflows", ".yaml") {
        visit_key(&parse_yaml(&path), "run", &mut |command| {
            let words: Vec<&str> = command.split_whitespace().collect();
            let ["just", recipe, ..] = words[..] else { panic!("{}: `{command}` is no recipe", path.display()) };
            let script = recipes.get(recipe).unwrap_or_else(|| panic!("the justfile has no recipe {recipe}"));
            assert!(root().join(script).is_file(), "{recipe} calls {script}, which isn't there");
            assert!(ci.contains(script), ".ci/run does not run {script}, as {} does", path.display());
        });
    }
}

/// A registry's turso brings a database and cubecl-llvm a download of LLVM: a version of the stand-ins that no longer fits what cubecl asks
/// for would be replaced by them without a word.
#[test]
fn stand_ins_are_not_replaced_by_what_they_stand_in_for() {
    let lock = read("Cargo.lock");
    for name in ["turso", "cubecl-llvm"] {
        let is_named = |entry: &&str| entry.lines().any(|line| line == format!("name = \"{name}\""));
        let entries: Vec<&str> = lock.split("[[package]]").filter(is_named).collect();
        let [entry] = entries.as_slice() else { panic!("Cargo.lock has {} packages named {name}", entries.len()) };
        let remedy = format!("give kernels/{name}/Cargo.toml the version that cubecl asks for");
        assert!(!entry.contains("\nsource = "), "Cargo.lock takes {name} from a registry: {remedy}");
    }
}

#[test]
fn a_plan_asks_facts_and_neither_the_disk_nor_the_environment() {
    for path in sources(&root().join("src/plan")) {
        let text = read(&path);
        for word in [
            "std::fs",
            "fs::",
            "std::env",
            "env::var",
            "from_env",
            "is_dir(",
            "is_file(",
            "exists(",
            "read_dir",
            "File::",
            "canonicalize",
            "metadata(",
        ] {
            assert!(!text.contains(word), "{} has {word}", path.display());
        }
    }
}

#[test]
fn rooms_import_downward_only() {
    // Each room, and the rooms that it may know.
    let words = ["units", "event", "json_file", "artifact", "versions", "yaml"];
    let contracts =
        ["units", "event", "json_file", "artifact", "versions", "yaml", "inference", "quantization", "stage"];
    let with = |more: &[&'static str]| contracts.iter().chain(more).copied().collect::<Vec<_>>();
    let everything = ["bench", "metrics", "pipeline", "plan", "store", "report"];
    let allowed: BTreeMap<&str, Vec<&str>> = BTreeMap::from([
        ("units", vec![]),
        ("event", vec![]),
        ("yaml", vec![]),
        ("versions", vec![]),
        ("json_file", vec![]),
        ("artifact", words.to_vec()),
        ("inference", contracts.to_vec()),
        ("quantization", words.to_vec()),
        ("stage", contracts.to_vec()),
        ("metrics", with(&[])),
        ("bench", with(&["metrics"])),
        ("pipeline", with(&[])),
        ("hub", words.to_vec()),
        ("dataset", [&words[..], &["hub"]].concat()),
        ("gguf", words.to_vec()),
        ("plan", with(&["pipeline"])),
        ("store", with(&[])),
        ("report", with(&["bench", "metrics", "pipeline", "plan"])),
        ("engine", with(&["gguf", "hub", "metrics"])),
        ("stages", with(&["bench", "dataset", "gguf", "hub", "metrics", "report", "store"])),
        ("ui", with(&["pipeline", "plan"])),
        ("run", with(&[&everything[..], &["dataset", "hub"]].concat())),
    ]);
    let src = root().join("src");
    for path in sources(&src) {
        let relative = path.strip_prefix(&src).expect("it was found below src");
        let first = relative.components().next().expect("a file has a name").as_os_str().to_string_lossy();
        let room = first.trim_end_matches(".rs");
        let Some(allowed) = allowed.get(room) else { continue };
        // Tests may reach further: they stand at the foot of a file.
        let text = fs::read_to_string(&path).expect("a source file is readable");
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
        for line in code.lines().filter(|line| !line.trim_start().starts_with("//")) {
            for rest in line.split("crate::").skip(1) {
                let known: String = rest.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
                assert!(
                    known == room || allowed.contains(&known.as_str()),
                    "src/{}: {room} must not know {known}: {}",
                    relative.display(),
                    line.trim()
                );
            }
        }
    }
}
