// Which words of two answers differ: the longest common subsequence of their words.

const MOST = 2000; // words of each that are compared: the table is their product

/** Two lists of [words, isCommon], which together make each text. */
export function diff(left, right) {
  const a = left.match(/\s+|[^\s]+/g) ?? [], b = right.match(/\s+|[^\s]+/g) ?? [];
  const n = Math.min(a.length, MOST), m = Math.min(b.length, MOST);
  const longest = Array.from({ length: n + 1 }, () => new Uint16Array(m + 1));
  for (let i = n - 1; i >= 0; i -= 1) {
    for (let j = m - 1; j >= 0; j -= 1) {
      longest[i][j] = a[i] === b[j] ? longest[i + 1][j + 1] + 1 : Math.max(longest[i + 1][j], longest[i][j + 1]);
    }
  }
  const out = [[], []];
  const push = (side, word, common) => {
    const last = out[side].at(-1);
    if (last && last[1] === common) last[0] += word;
    else out[side].push([word, common]);
  };
  let i = 0, j = 0;
  while (i < n || j < m) {
    if (i < n && j < m && a[i] === b[j]) { push(0, a[i++], true); push(1, b[j++], true); }
    else if (j >= m || (i < n && longest[i + 1][j] >= longest[i][j + 1])) push(0, a[i++], false);
    else push(1, b[j++], false);
  }
  for (const word of a.slice(n)) push(0, word, false);
  for (const word of b.slice(m)) push(1, word, false);
  return out;
}
