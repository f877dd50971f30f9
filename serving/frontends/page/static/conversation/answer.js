// An answer as it comes: text, thinking, tool calls, token probabilities, times.

export function begin() {
  return { role: "assistant", content: "", reasoning: "", calls: [], tokens: [], finish: null, stats: null, start: performance.now(), first: 0, last: 0, chunks: 0, usage: null };
}

/** Adds one chunk. */
export function take(answer, chunk) {
  if (chunk.usage) answer.usage = chunk.usage;
  for (const choice of chunk.choices) {
    const delta = choice.delta;
    const thinking = delta.reasoning ?? delta.reasoning_content ?? "";
    if (delta.content || thinking || delta.tool_calls) {
      answer.last = performance.now();
      answer.first ||= answer.last;
      answer.chunks += 1; // about a token each; the exact count comes with the usage
    }
    answer.content += delta.content || "";
    answer.reasoning += thinking;
    for (const call of delta.tool_calls || []) {
      const known = (answer.calls[call.index] ||= { id: "", name: "", arguments: "" });
      known.id ||= call.id || "";
      known.name += call.function?.name || "";
      known.arguments += call.function?.arguments || "";
    }
    for (const token of choice.logprobs?.content ?? []) {
      answer.tokens.push({
        text: token.token, p: Math.exp(token.logprob), top: token.top_logprobs.map((other) => [other.token, Math.exp(other.logprob)]),
      });
    }
    answer.finish = choice.finish_reason || answer.finish;
  }
}

/** Milliseconds to the first token, tokens a second after it, tokens, drafts where some were verified; null before the first. */
export function measure(answer) {
  if (!answer.first) return null;
  const tokens = answer.usage?.completion_tokens ?? answer.chunks;
  const seconds = (answer.last - answer.first) / 1000;
  return { ttft: Math.round(answer.first - answer.start), rate: tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : null, tokens, drafts: drafts(answer.usage) };
}

/** [accepted, verified] of the drafts; null where there were none. */
function drafts(usage) {
  const { accepted_prediction_tokens: accepted = 0, rejected_prediction_tokens: rejected = 0 } = usage?.completion_tokens_details ?? {};
  return accepted + rejected ? [accepted, accepted + rejected] : null;
}

/** What is kept of it. */
export function kept(answer) {
  const { role, content, reasoning, finish } = answer;
  return { role, content, reasoning, finish, calls: answer.calls.filter(Boolean), tokens: answer.tokens, stats: measure(answer) };
}

export const isEmpty = (answer) => !answer.content && !answer.reasoning && !answer.calls.some(Boolean);
