//! Artifacts are shared by stages that mean the same: each stage's record shows its own names.

use crate::artifact::Record;
use crate::plan::PlanNode;

/// Gives a record the address, the parameters and the config's name of the stage that shows it. Another stage may have computed it.
pub fn show_as(record: &mut Record, node: &PlanNode) {
    record.head.stage.clone_from(&node.stage.address);
    record.head.params.clone_from(&node.stage.params);
    if let Some(name) = &node.config_name {
        rename_config(record, name);
    }
}

fn rename_config(record: &mut Record, name: &str) {
    let mut before = None;
    if let Some(config) = record.body.get_mut("config").filter(|config| config.is_object()) {
        before = config["name"].as_str().map(str::to_owned);
        config["name"] = name.into();
    }
    if let Some(recipe) = record.body.get_mut("recipe").filter(|recipe| recipe["quantization"].is_object()) {
        recipe["quantization"]["name"] = name.into();
    }
    if let (Some(before), Some(summary)) = (before, record.body.get_mut("summary"))
        && let Some(rest) = summary.as_str().and_then(|text| text.strip_prefix(&format!("{before}: ")))
    {
        *summary = format!("{name}: {rest}").into();
    }
}
