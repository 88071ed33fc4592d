use super::*;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;

struct Disk {
    dir: tempfile::TempDir,
}

impl Disk {
    /// A model of two files below `m`, and a text.
    fn new() -> Disk {
        let dir = tempfile::tempdir().expect("a temporary folder");
        fs::create_dir_all(dir.path().join("m")).expect("a folder");
        let disk = Disk { dir };
        disk.write("m/config.json", "{}");
        disk.write("m/model.safetensors", "weights");
        disk.write("m/notes.txt", "not read");
        disk.write("a.txt", "a text");
        disk.write("c.yaml", "scheme: nf4\n");
        disk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).expect("a file");
    }

    fn sources(&self) -> Sources {
        let hub = HubSettings {
            cache_dir: self.path("hub"),
            endpoint: "http://127.0.0.1:9".to_owned(),
            token: None,
            is_offline: true,
        };
        Sources::new(self.dir.path(), hub, FileHashes::open(self.dir.path()))
    }

    fn names(&self, kind: SourceKind, written: &str) -> Vec<String> {
        let located = self.sources().locate(kind, written).expect("it is there");
        located.files.into_iter().map(|file| file.name).collect()
    }

    fn error(&self, kind: SourceKind, written: &str) -> String {
        self.sources().locate(kind, written).expect_err("an error").to_string()
    }
}

/// Returns a source as a plan has it.
fn planned(sources: &Sources, kind: SourceKind, written: &str) -> Source {
    let located = sources.locate(kind, written).expect("it is there");
    let file = |file: LocatedFile| {
        let path = file.path.expect("a path");
        let field = if kind == SourceKind::QuantizationConfig { "" } else { "files" };
        let hash = sources.hash(&path).expect("a hash");
        SourceFile { name: file.name, path: Some(path), hash, field: field.to_owned() }
    };
    let files: Vec<SourceFile> = located.files.into_iter().map(file).collect();
    let config = files[0].path.as_deref().filter(|_| kind == SourceKind::QuantizationConfig).and_then(read_config);
    Source { param: "p", kind, written: written.to_owned(), files, config }
}

#[test]
fn a_model_folder_is_its_files_under_one_spelling() {
    let disk = Disk::new();
    for written in ["m", "./m/", "m//"] {
        assert_eq!(disk.names(SourceKind::Model, written), ["m/config.json", "m/model.safetensors"], "{written}");
    }
    fs::create_dir(disk.path("m/additional_chat_templates")).expect("a folder");
    for name in ["additional_chat_templates/rag.jinja", "additional_chat_templates/x.md", "tokenizer.json"] {
        disk.write(&format!("m/{name}"), "x");
    }
    let expected =
        ["m/additional_chat_templates/rag.jinja", "m/config.json", "m/model.safetensors", "m/tokenizer.json"];
    assert_eq!(disk.names(SourceKind::Model, "m"), expected);
}

#[test]
fn shards_that_an_index_names_are_the_model_s_whatever_they_are_called() {
    let disk = Disk::new();
    disk.write("m/part-one", "weights");
    disk.write("m/model.safetensors.index.json", r#"{"weight_map": {"a": "part-one", "b": "part-two"}}"#);
    let names = disk.names(SourceKind::Model, "m");
    assert!(names.contains(&"m/part-one".to_owned()) && names.len() == 4, "{names:?}");
    symlink("nowhere", disk.path("m/part-two")).expect("a link");
    let error = disk.error(SourceKind::Model, "m");
    assert!(error.contains("m/part-two: it is a link to nowhere"), "{error}");
}

#[test]
fn what_cannot_be_listed_or_read_is_an_error_that_names_it() {
    let disk = Disk::new();
    fs::create_dir(disk.path("m/tokenizer.json")).expect("a folder");
    let error = disk.error(SourceKind::Model, "m");
    assert!(error.contains("m/tokenizer.json: it is a folder"), "{error}");
    fs::remove_dir(disk.path("m/tokenizer.json")).expect("the folder");
    symlink("nowhere.json", disk.path("m/tokenizer.json")).expect("a link");
    let error = disk.error(SourceKind::Model, "m");
    assert!(error.contains("m/tokenizer.json: it is a link to nowhere.json, which is not there"), "{error}");
    fs::remove_file(disk.path("m/tokenizer.json")).expect("the link");
    symlink("tokenizer.json", disk.path("m/tokenizer.json")).expect("a link to itself");
    assert!(disk.error(SourceKind::Model, "m").contains("m/tokenizer.json"));
    fs::remove_file(disk.path("m/tokenizer.json")).expect("the link");
    let name = std::ffi::OsStr::from_bytes(b"tokenizer\xff.json");
    fs::write(disk.path("m").join(name), "{}").expect("a file");
    let error = disk.error(SourceKind::Model, "m");
    assert!(error.contains("its name is not UTF-8"), "{error}");
    fs::remove_file(disk.path("m").join(name)).expect("the file");
    fs::write(disk.path("m").join(std::ffi::OsStr::from_bytes(b"notes\xff")), "").expect("a file");
    assert_eq!(disk.names(SourceKind::Model, "m").len(), 2);
}

#[test]
fn what_is_not_there_or_of_another_kind_is_named_as_written() {
    let disk = Disk::new();
    for (kind, written, expected) in [
        (SourceKind::Model, "./nowhere", "./nowhere: no such model folder or GGUF file (looked in "),
        (SourceKind::Model, "a.txt", "a.txt: no such model folder or GGUF file"),
        (SourceKind::QuantizationConfig, "m", "m: it is no file"),
        (SourceKind::QuantizationConfig, "x.yaml", "x.yaml: no such file"),
        (SourceKind::ModelConfig, "a.txt/config.json", "a.txt/config.json: no such file"),
        (SourceKind::Text, "b.txt", "b.txt: no such file"),
        (SourceKind::Text, "hf://datasets/a/b", "hf://datasets/a/b"),
    ] {
        let error = disk.error(kind, written);
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_file_that_changed_since_the_plan_is_named_and_one_that_was_only_touched_is_not() {
    let disk = Disk::new();
    let sources = disk.sources();
    let (model, text) = (planned(&sources, SourceKind::Model, "m"), planned(&sources, SourceKind::Text, "a.txt"));
    let verify = || sources.verify(&[&model, &text]).map(|_| ()).map_err(|error| error.to_string());
    assert_eq!(verify(), Ok(()));
    // The same content in a new file: another inode and other times.
    disk.write("other.txt", "a text");
    fs::rename(disk.path("other.txt"), disk.path("a.txt")).expect("a move");
    assert_eq!(verify(), Ok(()));
    disk.write("a.txt", "a tale");
    let error = verify().expect_err("it changed");
    assert!(error.contains("read a.txt: it changed while the run was going on"), "{error}");
    disk.write("a.txt", "a text");
    assert_eq!(verify(), Ok(()));
    fs::remove_file(disk.path("a.txt")).expect("the file");
    assert!(verify().is_err_and(|error| error.contains("read a.txt: it is gone")));
    disk.write("a.txt", "a text");
    disk.write("m/chat_template.jinja", "{{ x }}");
    assert!(verify().is_err_and(|error| error.contains("m/chat_template.jinja: it was not there")));
    fs::remove_file(disk.path("m/chat_template.jinja")).expect("the file");
    fs::rename(disk.path("m/config.json"), disk.path("m/config.bak")).expect("a move");
    assert!(verify().is_err_and(|error| error.contains("m/config.json: it is gone")));
}

#[test]
fn a_config_that_was_edited_and_means_the_same_did_not_change() {
    let disk = Disk::new();
    let sources = disk.sources();
    let config = planned(&sources, SourceKind::QuantizationConfig, "c.yaml");
    disk.write("c.yaml", "# nf4\nscheme: nf4\nblock_size: 64\n");
    assert!(sources.verify(&[&config]).is_ok());
    disk.write("c.yaml", "scheme: nf4\nblock_size: 128\n");
    assert!(sources.verify(&[&config]).is_err_and(|error| error.to_string().contains("c.yaml: it changed")));
    disk.write("c.yaml", "scheme: [\n");
    assert!(sources.verify(&[&config]).is_err());
}

#[test]
fn a_link_that_leads_to_another_content_since_the_plan_is_a_change() {
    let disk = Disk::new();
    for (commit, weights) in [("one", "weights"), ("two", "other weights")] {
        let dir = disk.path("hub/models--org--name/snapshots").join(commit);
        fs::create_dir_all(&dir).expect("a folder");
        fs::create_dir_all(disk.path("hub/models--org--name/blobs")).expect("a folder");
        let sha256 = blake3::hash(weights.as_bytes()).to_hex().to_string();
        let blob = disk.path("hub/models--org--name/blobs").join(&sha256);
        fs::write(&blob, weights).expect("a blob");
        symlink(&blob, dir.join("model.safetensors")).expect("a link");
        fs::write(dir.join("config.json"), "{}").expect("a file");
    }
    let repo = disk.path("hub/models--org--name");
    fs::create_dir_all(repo.join("refs")).expect("a folder");
    fs::write(repo.join("refs/main"), "one").expect("a ref");
    let sources = disk.sources();
    let model = planned(&sources, SourceKind::Model, "org/name");
    assert_eq!(model.files[1].name, "hf://org/name/model.safetensors");
    assert!(model.files[1].hash.starts_with("sha256:") && sources.verify(&[&model]).is_ok());
    // Another process downloads a newer revision.
    fs::write(repo.join("refs/main"), "two").expect("a ref");
    let error = sources.verify(&[&model]).expect_err("another revision").to_string();
    assert!(error.contains("hf://org/name/model.safetensors: it changed"), "{error}");
    fs::write(repo.join("refs/main"), "one").expect("a ref");
    assert!(sources.verify(&[&model]).is_ok());
    let target = fs::read_link(repo.join("snapshots/two/model.safetensors")).expect("a link");
    fs::remove_file(repo.join("snapshots/one/model.safetensors")).expect("the link");
    symlink(target, repo.join("snapshots/one/model.safetensors")).expect("a link");
    assert!(sources.verify(&[&model]).is_err());
}

#[test]
fn a_file_that_was_replaced_and_put_back_while_a_stage_ran_is_named() {
    let disk = Disk::new();
    let sources = disk.sources();
    let model = planned(&sources, SourceKind::Model, "m");
    let before = sources.verify(&[&model]).expect("nothing changed");
    assert!(sources.verify_since(&before, &[&model]).is_ok());
    fs::rename(disk.path("m/model.safetensors"), disk.path("aside")).expect("a move");
    disk.write("m/model.safetensors", "others");
    fs::rename(disk.path("aside"), disk.path("m/model.safetensors")).expect("a move");
    let error = sources.verify_since(&before, &[&model]).expect_err("it was away").to_string();
    assert!(error.contains("m/model.safetensors: it was written to while the stage read it"), "{error}");
    assert!(sources.verify(&[&model]).is_ok());
}

#[test]
fn a_file_that_may_not_be_read_is_named_without_advice_for_the_cache() {
    let source = io::Error::from(ErrorKind::PermissionDenied);
    let error = StoreError::Io { verb: "read", path: PathBuf::from("m/model.safetensors"), source };
    let text = SourceError::of(error).to_string();
    assert!(text.starts_with("read m/model.safetensors: ") && !text.contains("--cache"), "{text}");
}
