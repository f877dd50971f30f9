// How a model's messages become its prompt: its chat template, to be read.
import { $ } from "/static/dom.js";
import { tokenizerInfo } from "/static/api.js";

/** Shows the template of a model, an adapter's own where it has one. */
export async function showTemplate(model, fail) {
  try {
    const info = await tokenizerInfo(model);
    $("#template-model").textContent = model;
    $("#template-text").textContent = info.chat_template ?? "This model has no chat template: it completes texts.";
    $("#template-dialog").showModal();
  } catch (error) {
    fail(error.message);
  }
}
