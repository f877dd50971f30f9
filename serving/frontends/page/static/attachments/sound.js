// Sound that is sent: WAV and MP3 as they are, whatever else the browser plays as WAV of one channel at 16 kHz, which is what models
// of speech hear. And the microphone.
import { dataUrl } from "/static/attachments/urls.js";

const RATE = 16_000; // Hz
const LARGEST = 11 * 2 ** 20; // bytes: the server takes bodies of 16 MiB, and base64 makes four of three
const PLAIN = { "audio/wav": "audio/wav", "audio/x-wav": "audio/wav", "audio/wave": "audio/wav", "audio/mpeg": "audio/mpeg", "audio/mp3": "audio/mpeg" };

export const isSound = (file) => file.type.startsWith("audio/");

/** A sound file as a data URL of audio/wav or audio/mpeg. Throws an Error for what the browser cannot read. */
export async function sound(file) {
  const plain = PLAIN[file.type];
  const kept = plain && file.size <= LARGEST ? file.slice(0, file.size, plain) : wav(await samples(file));
  if (kept.size > LARGEST) throw new Error(`it is too long: at most ${Math.floor(LARGEST / 2 / RATE / 60)} minutes can be sent.`);
  return dataUrl(kept);
}

/** One channel at RATE. */
async function samples(file) {
  let found;
  try {
    found = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(await file.arrayBuffer()); // resamples too
  } catch { throw new Error("it cannot be read as sound."); }
  const mono = new Float32Array(found.length);
  for (let channel = 0; channel < found.numberOfChannels; channel += 1) {
    found.getChannelData(channel).forEach((value, i) => { mono[i] += value / found.numberOfChannels; });
  }
  return mono;
}

/** Samples as a WAV file of 16 bits. */
function wav(mono) {
  const view = new DataView(new ArrayBuffer(44 + 2 * mono.length));
  const text = (at, word) => [...word].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  text(0, "RIFF"); view.setUint32(4, 36 + 2 * mono.length, true); text(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 1, true);
  view.setUint32(24, RATE, true); view.setUint32(28, 2 * RATE, true); view.setUint16(32, 2, true); view.setUint16(34, 16, true);
  text(36, "data"); view.setUint32(40, 2 * mono.length, true);
  mono.forEach((value, i) => view.setInt16(44 + 2 * i, Math.round(32767 * Math.max(-1, Math.min(1, value))), true));
  return new Blob([view], { type: "audio/wav" });
}

/** Whether this browser lets a page listen: it does on https and on this machine's own addresses. */
export const canRecord = () => Boolean(navigator.mediaDevices?.getUserMedia && globalThis.MediaRecorder);

/** Listens to the microphone from now on. Returns a function that ends that and gives the recording as a File. Throws an Error. */
export async function record() {
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  } catch (error) {
    throw new Error(error.name === "NotFoundError" ? "There is no microphone." : "The browser does not let this page use the microphone: allow it beside the address.");
  }
  const recorder = new MediaRecorder(stream);
  const pieces = [];
  recorder.addEventListener("dataavailable", (event) => pieces.push(event.data));
  recorder.start();
  return () => new Promise((resolve) => {
    recorder.addEventListener("stop", () => {
      stream.getTracks().forEach((track) => track.stop());
      resolve(new File(pieces, `recording ${new Date().toTimeString().slice(0, 8)}`, { type: recorder.mimeType.replace(/^video/, "audio") }));
    }, { once: true });
    recorder.stop();
  });
}
